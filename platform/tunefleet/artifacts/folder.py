"""The folder of a run, by part.

<ray_storage_path>/<ray_run_name>/checkpoints   step_00000010, ... each complete or absent
                                  /model        what a user keeps, written when the run ends
                                  /record       plan, metrics, attempts, failures, result
                                  /claim.json   who may write
                                  /scratch      checkpoints in the making, gone when no command runs
"""

from __future__ import annotations

from dataclasses import dataclass

from tunefleet.artifacts.record import RESULT
from tunefleet.storage import Place


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives."""

    root: Place

    @property
    def checkpoints(self) -> Place:
        return self.root.child("checkpoints")

    @property
    def model(self) -> Place:
        return self.root.child("model")

    @property
    def record(self) -> Place:
        return self.root.child("record")

    @property
    def claim(self) -> Place:
        return self.root.child("claim.json")

    @property
    def scratch(self) -> Place:
        return self.root.child("scratch")

    def finished(self) -> bool:
        """Whether the run went to its end: its result is the last thing that is written."""
        return self.record.child(RESULT).exists()
