"""A run in this very process: all that a worker does, with one worker and without Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunefleet.artifacts.claim import claim_run
from tunefleet.artifacts.folder import RunFolder
from tunefleet.launch.cluster import local_shape
from tunefleet.launch.draft import draft
from tunefleet.launch.runs import open_run
from tunefleet.recipe.sections import Recipe
from tunefleet.storage import Place, place
from tunefleet.training.determinism import pin
from tunefleet.worker.events import Event, Stepped
from tunefleet.worker.job import Job
from tunefleet.worker.leaving import Wish
from tunefleet.worker.reporter import Reporter
from tunefleet.worker.run import Ending, attempt
from tunefleet.worker.seat import Seat


@dataclass
class Gathered:
    """Keeps the events that a driver would be told."""

    events: list[Event] = field(default_factory=list)
    stop_at: int | None = None
    """The step behind which the driver would want to stop."""
    checkpoints: list[str] = field(default_factory=list)

    def send(self, event: Event) -> None:
        self.events.append(event)

    @property
    def steps(self) -> list[int]:
        return [event.step.step for event in self.events if isinstance(event, Stepped)]

    def wish(self) -> Wish | None:
        return "stop" if self.stop_at is not None and self.steps and self.steps[-1] >= self.stop_at else None

    def terminated(self) -> bool:
        return False

    def preempted(self) -> bool:
        return False

    def hand_over(self, checkpoint: Place, metrics: dict[str, Any]) -> None:
        self.checkpoints.append(checkpoint.name)

    def flush(self) -> None:
        """Everything has arrived already."""


@dataclass(frozen=True)
class Finished:
    ending: Ending
    told: Gathered
    folder: RunFolder
    notices: tuple[str, ...]


def run_alone(
    recipe: Recipe,
    root: Path,
    stop_at: int | None = None,
    *,
    storage: Place | None = None,
    told: Gathered | None = None,
) -> Finished:
    """Plan a recipe, and train it to its end or to where it is stopped.

    Args:
        storage: the folder of the run, where it is not the one that the recipe names.
        told: where to gather what a driver would be told.
    """
    plan = draft(recipe, local_shape(recipe.ray), root)
    folder = RunFolder(storage or place(plan.place.storage_path, base=root).child(plan.place.run_name))
    notices = open_run(plan, folder)
    job = Job(plan, folder, "tunefleet train recipe.yaml", claim_run(folder.claim))
    pin(plan.workers.threads)
    seat = Seat(0, 1, torch.device("cpu"))
    told = told or Gathered(stop_at=stop_at)
    return Finished(attempt(job, seat, Reporter(job, seat, told), told), told, folder, tuple(notices))
