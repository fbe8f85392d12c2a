"""`ray job submit` from a clone, on a cluster that has the third-party packages and nothing of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.job_server import Head, bare_environment, job_server

LEFT_AT_HOME = (".git", ".venv*", ".quickstart", ".benchmarks", "__pycache__", ".*_cache", "outputs", "dist")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


class Clone:
    """The files of the repository in a folder of their own, from where jobs are submitted by Ray's own command."""

    def __init__(self, folder: Path, head: Head, programs: Path) -> None:
        self.folder, self.head, self._ray = folder, head, programs / "ray"

    def submit(self, *command: str) -> tuple[int, str]:
        """Submit a job and follow it: the code of `ray job submit`, and what it printed."""
        words = [str(self._ray), "job", "submit", "--address", self.head.url, "--working-dir", ".", "--", *command]
        environment = {**os.environ, **self.head.variables, "COLUMNS": "250"}
        done = subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("clone") / "tunefleet"
    shutil.copytree(repository, folder, ignore=shutil.ignore_patterns(*LEFT_AT_HOME))
    # What a person has made at home stays there, by .gitignore: a model that is none would be found otherwise.
    (folder / ".quickstart" / "base").mkdir(parents=True)
    programs = bare_environment(tmp_path_factory.mktemp("bare") / "environment")
    there = subprocess.run([programs / "python", "-c", "import tunefleet"], cwd="/", capture_output=True, check=False)
    assert there.returncode == 1
    with job_server(tmp_path_factory.mktemp("home"), programs=programs) as head:
        yield Clone(folder, head, programs)


def test_the_commands_of_the_readme(clone: Clone) -> None:
    """Nothing is there; the quickstart is made by a job; a run and a search find it."""
    code, text = clone.submit("python", "jobs/train.py", "jobs/lora_sft.yaml")
    assert code == 1, text
    assert "make it there with `ray job submit --working-dir . -- python jobs/prepare_quickstart.py`" in text

    code, text = clone.submit("python", "jobs/prepare_quickstart.py", "--small")
    assert code == 0, text
    kept = clone.head.home / "tunefleet" / ".quickstart"
    assert {"data", "init", "base", "runs"} <= {one.name for one in kept.iterdir()}

    code, text = clone.submit("python", "jobs/train.py", "jobs/lora_sft.yaml", "max_steps=6", "eval_strategy=no")
    assert code == 0, text
    run = kept / "runs" / "quickstart-lora"
    assert json.loads((run / "record" / "result.json").read_text())["step"] == 6
    assert (run / "model" / "adapter_model.safetensors").is_file()

    few = ("max_steps=4", "eval_steps=2", "tune.num_samples=2", "tune.scheduler=none")
    code, text = clone.submit("python", "jobs/tune.py", "jobs/search_methods.yaml", *few)
    assert code == 0, text
    book = json.loads((kept / "runs" / "quickstart-search_methods" / "trials.json").read_text())
    assert [trial["state"] for trial in book["trials"]] == ["finished"] * 2


def test_the_explicit_form(clone: Clone) -> None:
    """`jobs/runtime_env.yaml` says the same, and a recipe that git ignores is missed."""
    (clone.folder / "outputs").mkdir(exist_ok=True)
    shutil.copy(clone.folder / "jobs" / "lora_sft.yaml", clone.folder / "outputs" / "own.yaml")
    words = ["job", "submit", "--address", clone.head.url, "--runtime-env", "jobs/runtime_env.yaml", "--"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *words, "python", "jobs/train.py", "outputs/own.yaml"],
        cwd=clone.folder,
        env={**os.environ, "COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "outputs/own.yaml: is not in the job's folder" in done.stdout + done.stderr
