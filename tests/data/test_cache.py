"""A cache folder is whole or not there, also with two processes at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunefleet.data.cache import MANIFEST, intact_manifest, load_or_build
from tunefleet.errors import Refused


def build(folder: Path) -> dict[str, Any]:
    (folder / "rows").write_text("abc")
    return {"said": 1}


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError(f"{folder} should have been found")


def test_built_once_then_found(tmp_path: Path) -> None:
    manifest, built = load_or_build(tmp_path / "x", build, rebuild=False)
    assert built
    assert manifest["said"] == 1
    assert manifest["files"]["rows"]["bytes"] == 3
    assert load_or_build(tmp_path / "x", never, rebuild=False) == (manifest, False)
    assert load_or_build(tmp_path / "x", build, rebuild=True) == (manifest, True)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["x"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damage_is_found_and_mended(tmp_path: Path, damage: str) -> None:
    load_or_build(tmp_path / "x", build, rebuild=False)
    rows = tmp_path / "x" / "rows"
    if damage == "manifest":
        (tmp_path / "x" / MANIFEST).write_text("{")
    elif damage == "remove":
        rows.unlink()
    else:
        rows.write_text("ab" if damage == "truncate" else "abd")
    assert intact_manifest(tmp_path / "x") is None
    assert load_or_build(tmp_path / "x", build, rebuild=False)[1]
    assert rows.read_text() == "abc"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> dict[str, Any]:
        (folder / "rows").write_text("half")
        raise Refused("no")

    with pytest.raises(Refused):
        load_or_build(tmp_path / "x", fails, rebuild=False)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cache_dir"):
        load_or_build(tmp_path / "file" / "x", build, rebuild=False)


PROCESS = """
import os, sys, time
from pathlib import Path
from tunefleet.data.cache import load_or_build
place = Path(sys.argv[1])
def build(folder):
    (place.parent / f"built-by-{os.getpid()}").touch()
    (folder / "rows").write_text("abc")
    time.sleep(0.5)
    return {}
print("ready", flush=True)
sys.stdin.readline()
print(load_or_build(place, build, rebuild=False)[1], flush=True)
"""


def test_two_processes_at_once_build_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "x")]
    roots = str(Path(__file__).resolve().parents[2] / "platform")
    pair = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": roots})
        for _ in range(2)
    ]
    for process in pair:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = sorted(process.communicate(timeout=30)[0].strip() for process in pair)
    assert answers == ["False", "True"]
    assert len(list(tmp_path.glob("built-by-*"))) == 1
    assert json.loads((tmp_path / "x" / MANIFEST).read_text())["files"]["rows"]["bytes"] == 3
