"""What is asked of a tracker of experiments, and what it is told of a run."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal, Protocol

from tunefleet.errors import Refused
from tunefleet.storage import Place

LOADING = threading.Lock()
"""Held while a tracker's package is imported: two threads that import what both need can find it half made."""

End = Literal["finished", "stopped", "failed"]

PACKAGES: Mapping[str, tuple[str, ...]] = {"mlflow": ("mlflow", "mlflow-skinny"), "wandb": ("wandb",)}
"""For each tracker the packages of which one must be installed."""


@dataclass(frozen=True)
class TrackedRun:
    """One of our runs, as a tracker shows it."""

    name: str
    config: Mapping[str, object]
    """The resolved recipe, and under `plan` the plan: plain JSON without secrets."""
    record: Place
    """Where the tracker's name for the run is kept, in a small file."""
    folder: Path
    """The record's folder on this machine, for what a tracker writes itself."""

    def tracked_as(self, tracker: str) -> str | None:
        """The tracker's own name for the run; None where it has not seen it yet."""
        file = self.record.child(f"{tracker}.json")
        if not file.exists():
            return None
        name: str = json.loads(file.read_text())["run_id"]
        return name

    def keep(self, tracker: str, run_id: str) -> None:
        """Remember the tracker's name for the run, so that whoever resumes it goes on there."""
        self.record.child(f"{tracker}.json").write_text(json.dumps({"run_id": run_id}) + "\n")


class Tracker(Protocol):
    """One run at one tracker. Called by one thread; every call may wait for a network and raise anything."""

    @property
    def name(self) -> str:
        """As `report_to` calls it."""

    def open(self) -> None:
        """Go on with the run where the tracker has it, or begin it there. Called again after a failure."""

    def reached(self, curve: str) -> int:
        """The last step that the tracker has of a curve; -1 where it has none."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add points to curves, all of them later than those which are there."""

    def close(self, end: End) -> None:
        """Say how the attempt ended."""


def refuse_missing(report_to: Sequence[str]) -> None:
    """
    Raises:
        Refused: a tracker is asked for whose package is not installed.
    """
    for tracker in report_to:
        packages = PACKAGES.get(tracker, ())
        if packages and not any(_is_installed(package) for package in packages):
            raise Refused(
                f"report_to: {tracker} needs a package that is not installed here: pip install 'tunefleet[{tracker}]', "
                f"or drop it from report_to."
            )


def _is_installed(package: str) -> bool:
    # Not by looking for a module: a folder of that name, as trackers leave one, would pass for it.
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
