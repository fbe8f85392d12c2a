"""The folder that a person looks into: nothing of anybody else's in it is ever written over unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunefleet.artifacts.folder import RunFolder
from tunefleet.errors import Refused
from tunefleet.launch.home import bring_home, refuse_foreign_output, refuse_unwritable
from tunefleet.storage import place


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has left a model and a record."""
    run = tmp_path / "runs" / "mine"
    for name in ("model", "record"):
        (run / name).mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "record" / "metrics.jsonl").write_text("")
    return RunFolder(place(str(run)))


def test_a_run_may_write_over_its_own_files(folder: RunFolder, tmp_path: Path) -> None:
    output = tmp_path / "out"
    refuse_foreign_output(output, folder, overwrite=False)
    bring_home(folder, output, plot=False)
    assert {path.name for path in output.iterdir()} == {"config.json", "metrics.jsonl", "run.json"}
    refuse_foreign_output(output, folder, overwrite=False)


@pytest.mark.parametrize("marker", [None, "", "{", "[]", json.dumps({"run": "file:///another"}), b"\xff\xfe"])
def test_files_of_something_else_are_left_alone(folder: RunFolder, tmp_path: Path, marker: str | bytes | None) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    if marker is not None:
        (output / "run.json").write_bytes(marker if isinstance(marker, bytes) else marker.encode())
    with pytest.raises(Refused, match="holds files of something else: choose another output_dir"):
        refuse_foreign_output(output, folder, overwrite=False)
    refuse_foreign_output(output, folder, overwrite=True)


@pytest.mark.parametrize("folder", ["thesis.txt", "thesis.txt/out", "/proc/out"])
def test_what_cannot_be_written_to_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(Refused, match=r"output_dir: .* cannot be written to \(.*\): choose another output_dir"):
        refuse_unwritable(tmp_path / folder, "output_dir")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_what_can_be_written_to_is_made_and_left_empty(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "a" / "b", "output_dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []
