"""Checkpoints that several ranks make together, each with files of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.group import run_group

from tunefleet.storage import place

Said = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have been."""
    folder = tmp_path_factory.mktemp("ranks")
    run_group([["tests.worker.ranks", str(rank), str(folder)] for rank in (0, 1)], seconds=240)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> Said:
    """What each rank has seen."""
    return [json.loads((folder / f"said{rank}.json").read_text()) for rank in (0, 1)]


def test_a_checkpoint_holds_the_files_of_all_ranks(folder: Path) -> None:
    checkpoint = place(folder / "run" / "checkpoints" / "step_00000010")
    assert checkpoint.problem(hashes=True) is None
    assert [file.name for file in checkpoint.children()] == ["complete.json", "weights_0", "weights_1"]
    sealed = json.loads(checkpoint.child("complete.json").read_text())["files"]
    assert sorted(sealed) == ["weights_0", "weights_1"]


def test_what_fails_on_one_rank_fails_on_all_and_leaves_nothing(folder: Path, said: Said) -> None:
    assert "both wrote weights" in said[0]["clash"]
    assert said[1]["clash"].startswith("RunFailed: Rank 0 failed: Rank 1 and one before it both wrote weights of ")
    assert said[0]["fails"].startswith("Refused: Rank 1 failed: ")
    assert "is no folder" in said[1]["fails"]
    assert [one.name for one in place(folder / "run" / "checkpoints").children()] == ["step_00000010"]


def test_a_storage_that_is_not_the_same_everywhere_is_found_out(said: Said) -> None:
    sentence = "weights_1 is missing): does every node reach this very storage?"
    assert all(sentence in one["not shared"] for one in said)


def test_every_rank_goes_on_from_the_files_of_all(folder: Path, said: Said) -> None:
    for kind in ("local", "remote"):
        assert [one[kind]["files"].keys() >= {"weights_0", "weights_1"} for one in said] == [True, True]
    assert said[0]["local"]["folder"] == str(folder / "run" / "checkpoints" / "step_00000010")


def test_a_remote_checkpoint_is_copied_once_for_each_node_and_removed(said: Said) -> None:
    copies = {one["remote"]["folder"] for one in said}
    assert len(copies) == 1
    assert [one["remote"]["left"] for one in said] == [False, False]
