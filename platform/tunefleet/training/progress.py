"""Where a run stands, by one of its checkpoints. Light to import, as `step.py` is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunefleet.storage import Place


@dataclass(frozen=True)
class Progress:
    """Where a run stands at an update boundary."""

    step: int = 0
    """Updates applied, also the index of the next one in the batch schedule."""
    record: Mapping[str, int | float | None] = field(default_factory=dict)
    """The sums that whoever records the run goes on from (`artifacts.record.Recorder.state`)."""


def read_progress(checkpoint: Place) -> Progress:
    """Where a checkpoint in storage stands.

    Raises:
        FileNotFoundError: it is no checkpoint.
    """
    return Progress(**json.loads(checkpoint.child("state.json").read_text())["progress"])
