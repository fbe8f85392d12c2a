"""What the book says of trials that failed, without Ray's processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError
from tests.search.test_book import trial

from tunefleet.errors import RunFailed
from tunefleet.search.book import RUNS, Book
from tunefleet.search.schedulers import Clock
from tunefleet.search.tuner import Scribe
from tunefleet.storage import place


@dataclass
class Failed:
    """The part of Ray's trial that is asked when it has failed."""

    config: dict[str, str]
    pickled_error_file: str
    trial_id: str = "a"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RayTaskError("train", "a page\nof frames", RunFailed("rank 0 left no word.")), "rank 0 left no word."),
        (ActorDiedError(), "The actor died unexpectedly before finishing this task."),
    ],
)
def test_a_trial_that_failed_too_often_is_recorded_with_what_ray_caught(
    error: Exception, told: str, tmp_path: Path
) -> None:
    book = Book(place(tmp_path))
    book.trials = [trial(1, "running", 2.0)]
    (tmp_path / RUNS / book.trials[0].name).mkdir(parents=True)
    (tmp_path / "error.pkl").write_bytes(cloudpickle.dumps(error))
    nobody: Any = None
    failed: Any = Failed({"trial": book.trials[0].name}, str(tmp_path / "error.pkl"))
    Scribe(book, nobody, place(tmp_path), Clock(40, 10, 10)).on_trial_error(0, [], failed)
    (kept,) = Book(place(tmp_path)).trials
    assert (kept.state, kept.error) == ("failed", told)
