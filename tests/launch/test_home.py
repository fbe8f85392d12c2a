"""The folder that a person looks into: nothing of anybody else's in it is ever written over unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunefleet.artifacts.folder import RunFolder
from tunefleet.errors import Refused
from tunefleet.launch.home import bring_home, refuse_foreign_output
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


def test_a_file_in_its_place_is_refused_in_any_case(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(Refused, match="is a file: choose another"):
            refuse_foreign_output(tmp_path / "out", folder, overwrite)
