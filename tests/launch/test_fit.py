"""What is made of Ray Train's own errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.train import WorkerGroupError

from tunefleet.artifacts.folder import RunFolder
from tunefleet.errors import RunFailed
from tunefleet.launch.fit import in_a_line
from tunefleet.launch.verdict import summary_of
from tunefleet.storage import place


def test_workers_that_left_no_word_are_told_of_in_one_line(tmp_path: Path) -> None:
    page = "A worker health check failed.\nWorker info: Worker(\n  actor=...\nThe actor died"
    error = WorkerGroupError(f"Training failed due to worker errors:\n{page}", {1: RuntimeError(page)})
    with pytest.raises(
        RunFailed, match="without a word from its workers: rank 1: A worker health check failed"
    ) as told:
        summary_of(None, RunFailed(in_a_line(error)), RunFolder(place(tmp_path)), "mark")
    assert "\n" not in str(told.value)
    assert "killed, ran out of its node's memory" in str(told.value)
