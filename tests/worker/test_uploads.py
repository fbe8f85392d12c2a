"""Checkpoints on their way to a slow or failing store while training goes on. No Ray: one worker, in this process."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from tests.worker.alone import Gathered, run_alone
from tests.worker.slow_storage import slow_place

from tunefleet.artifacts.claim import Claim, claim_run
from tunefleet.artifacts.metrics import metrics_of, read_metrics
from tunefleet.artifacts.record import read_attempts
from tunefleet.checkpoints import STEP_NAME, newest_complete, step_of
from tunefleet.errors import Superseded
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import Recipe
from tunefleet.storage import Files, Place, place
from tunefleet.worker.events import Saved, Stepped

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 60.0


@pytest.fixture
def recipe(job: dict[str, object]) -> Recipe:
    keys = {"finetuning_type": "lora", "max_samples": 40, "per_device_train_batch_size": 4, "bf16": False}
    return read_flat(job | keys | {"max_steps": 8, "save_steps": 2, "save_total_limit": 1, "logging_steps": 1})


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("."))


def test_training_goes_on_during_an_upload_and_the_next_save_waits(recipe: Recipe, tmp_path: Path) -> None:
    told, run = Gathered(), tmp_path / "run"
    under_way: list[list[str]] = []

    def before_writing(path: str) -> None:
        """Checkpoint 4 takes until step 6 is done, at whose end the next one is due."""
        if "step_00000004" in path and path.endswith("optimizer.pt"):
            wait_for(lambda: told.steps[-1] == 6)
            time.sleep(0.3)
            under_way.append([*checkpoints(run), f"after step {told.steps[-1]}"])

    finished = run_alone(recipe, tmp_path, storage=slow_place(run, before_writing), told=told)
    # The newest complete one stays until the next is sealed, and no step is taken over a save that is due.
    assert under_way == [["step_00000002", "after step 6"]]
    order = [
        event.step.step if isinstance(event, Stepped) else -event.step
        for event in told.events
        if isinstance(event, Stepped | Saved)
    ]
    assert order.index(-4) > order.index(6)
    assert order.index(-4) < order.index(7)
    assert told.checkpoints == [f"step_0000000{step}" for step in (2, 4, 6, 8)]
    assert checkpoints(run) == ["step_00000008"]
    assert finished.ending["executed_steps"] == 8
    assert not any(path.name.startswith("tunefleet-") and "part" in str(path) for path in (run / "scratch").rglob("*"))


def test_the_lines_of_a_checkpoint_are_in_storage_before_it_counts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kill between the two would lose them: the next attempt begins behind them."""
    (tmp_path / "far").mkdir()
    far = Place(SubTreeFileSystem(str(tmp_path / "far"), LocalFileSystem()), "run")
    last_lines: dict[int, int] = {}
    seal = Place.seal

    def watched(self: Place, staging: Place, parts: Sequence[Files]) -> None:
        if STEP_NAME.fullmatch(self.name):
            record = far.child("record", "metrics.jsonl")
            last_lines[step_of(self)] = metrics_of(record.read_text().encode())[-1]["step"] if record.exists() else 0
        seal(self, staging, parts)

    monkeypatch.setattr(Place, "seal", watched)
    run_alone(recipe, tmp_path, storage=far)
    assert len(last_lines) > 1
    assert last_lines == {step: step for step in last_lines}


def test_an_upload_that_fails_ends_the_attempt_at_the_next_step(recipe: Recipe, tmp_path: Path) -> None:
    told, run = Gathered(), tmp_path / "run"

    def before_writing(path: str) -> None:
        if "step_00000004" in path and path.endswith("complete.json"):
            raise OSError(errno.ENOSPC, "the store is full")

    with pytest.raises(OSError, match="the store is full"):
        run_alone(recipe, tmp_path, storage=slow_place(run, before_writing), told=told)
    assert told.steps[-1] in (5, 6)  # at once, or when the next one is due
    assert told.checkpoints == ["step_00000002"]
    assert checkpoints(run) == ["step_00000002"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]

    again = run_alone(recipe, tmp_path, storage=place(run))
    assert again.ending["executed_steps"] == 6


def test_a_process_killed_during_an_upload_goes_on_from_the_checkpoint_before(recipe: Recipe, tmp_path: Path) -> None:
    run, twin = tmp_path / "run", tmp_path / "twin"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.flat()))
    arguments = [str(tmp_path / "recipe.json"), str(run), str(tmp_path), "step_00000004"]
    command = [sys.executable, "-m", "tests.worker.slow_storage", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "uploading\n"
    finally:
        process.kill()
        process.wait()
    newest, notices = newest_complete(place(run / "checkpoints"))
    assert newest is not None
    assert step_of(newest) == 2
    assert notices == []

    killed = run_alone(recipe, tmp_path, storage=place(run))
    assert [attempt["start_step"] for attempt in read_attempts(run / "record")] == [0, 2]
    assert killed.ending["executed_steps"] == 6
    unhurt = run_alone(recipe, tmp_path, storage=place(twin))
    assert killed.ending["fingerprints"] == unhurt.ending["fingerprints"]
    assert [line["step"] for line in read_metrics(run / "record" / "metrics.jsonl")] == list(range(1, 9))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000008"]


def test_a_command_that_comes_later_takes_the_run_over(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def before_writing(path: str) -> None:
        if "step_00000004" in path and path.endswith("optimizer.pt"):
            claim_run(place(run / "claim.json"))

    with pytest.raises(Superseded, match="Another command has taken this run over"):
        run_alone(recipe, tmp_path, storage=slow_place(run, before_writing))
    assert checkpoints(run) == ["step_00000002"]
    assert not (run / "model").exists()


def test_a_run_whose_folder_is_removed_on_the_way_is_told_so(recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def before_writing(path: str) -> None:
        if "step_00000004" in path and path.endswith("optimizer.pt"):
            (run / "claim.json").unlink()

    with pytest.raises(Superseded, match=r"claim\.json is gone, so somebody has removed the run's folder"):
        run_alone(recipe, tmp_path, storage=slow_place(run, before_writing))
    assert checkpoints(run) == ["step_00000002"]


def test_of_several_attempts_the_newest_may_write(tmp_path: Path) -> None:
    note = place(tmp_path / "claim.json")
    first, second = (Claim(note, mark) for mark in [claim_run(note)] * 2)
    first.take()
    first.check()
    second.take()
    second.check()
    with pytest.raises(Superseded):
        first.check()
    other = Claim(note, claim_run(note))
    with pytest.raises(Superseded):
        second.take()
    other.take()
    other.check()
