"""The script that a Ray job runs, as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "train.py"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, cwd="/", check=False)


def test_it_is_the_train_command(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: fast\n")
    answer = run(SCRIPT, recipe, "seed=-1")
    assert answer.returncode == 2
    assert {"learning_rate", "seed", "dataset"} <= {line.partition(":")[0] for line in answer.stderr.splitlines()}


def test_a_python_without_the_dependencies_is_told_in_one_sentence() -> None:
    answer = run("-S", "-E", SCRIPT, "recipe.yaml")  # without site-packages
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"{sys.executable} has no package ")
    assert answer.stderr.count("\n") == 1
