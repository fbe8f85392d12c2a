"""What is brought from storage, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunefleet.artifacts.folder import RunFolder
from tunefleet.commands.fetch import fetch, named
from tunefleet.errors import Refused
from tunefleet.search.book import Book
from tunefleet.search.result import keep_result
from tunefleet.storage import Place, place

LINES = "".join(json.dumps({"step": step, "loss": 3.0 - step}) + "\n" for step in (1, 2))


def finished_run(root: Place) -> RunFolder:
    folder = RunFolder(root)
    source = Path(root.path).parent / "made"
    source.mkdir(parents=True, exist_ok=True)
    (source / "model.safetensors").write_bytes(b"weights")
    folder.model.upload(source)
    folder.record.child("metrics.jsonl").write_text(LINES)
    folder.record.child("result.json").write_text("{}")
    return folder


def test_a_run_comes_home_by_name_and_by_path(tmp_path: Path) -> None:
    run = finished_run(place(tmp_path / "runs" / "first")).root
    assert named("first", str(tmp_path / "runs")).path == named(str(tmp_path / "runs" / "first"), "~/x").path
    home = tmp_path / "home"
    fetch(run, home, overwrite=False)
    assert {file.name for file in home.iterdir()} >= {"model.safetensors", "metrics.jsonl", "loss.png", "run.json"}
    fetch(run, home, overwrite=False)  # its own files may be written again


def test_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    run = finished_run(place(tmp_path / "runs" / "first")).root
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("mine")
    with pytest.raises(Refused, match=r"--to .* holds files of something else: .* add --overwrite"):
        fetch(run, home, overwrite=False)
    assert [file.name for file in home.iterdir()] == ["thesis.tex"]
    fetch(run, home, overwrite=True)
    assert (home / "thesis.tex").read_text() == "mine"


def test_what_is_not_finished_or_not_there_is_refused(tmp_path: Path) -> None:
    run = finished_run(place(tmp_path / "runs" / "first"))
    run.record.child("result.json").delete()
    with pytest.raises(Refused, match="The run first is not finished"):
        fetch(run.root, tmp_path / "home", overwrite=False)
    Book(place(tmp_path / "runs" / "hunt")).save()
    with pytest.raises(Refused, match="The search hunt is not finished"):
        fetch(place(tmp_path / "runs" / "hunt"), tmp_path / "home", overwrite=False)
    (tmp_path / "runs" / "pictures").mkdir()
    with pytest.raises(Refused, match="is no run and no search"):
        fetch(place(tmp_path / "runs" / "pictures"), tmp_path / "home", overwrite=False)
    with pytest.raises(Refused, match="does not exist"):
        named("third", str(tmp_path / "runs"))
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("winners", [["trial_0001"], ["trial_0001", "trial_0002"]])
def test_a_search_brings_its_files_and_the_one_best_model(tmp_path: Path, winners: list[str]) -> None:
    search = place(tmp_path / "runs" / "hunt")
    for winner in winners:
        finished_run(search.child("trials", winner))
    files = tmp_path / "files"
    (files / "best_of").mkdir(parents=True)
    (files / "best_of" / "lora.yaml").write_text("a: 1")
    keep_result(search, files, winners)
    book = Book(search)
    book.complete = True
    book.save()
    home = tmp_path / "home"
    fetch(search, home, overwrite=False)
    assert (home / "best_of" / "lora.yaml").read_text() == "a: 1"
    assert (home / "model.safetensors").exists() is (len(winners) == 1)
    assert json.loads((home / "run.json").read_text())["run"] == search.uri
    assert not (home / "winners.json").exists()
