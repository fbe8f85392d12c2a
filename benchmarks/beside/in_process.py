"""A trial in the process of an actor that is kept: the worker function of every run, with nobody around it."""

from typing import Any

import torch

from tunefleet.artifacts.claim import claim_run
from tunefleet.artifacts.folder import RunFolder
from tunefleet.launch.runs import open_run
from tunefleet.plan import Plan
from tunefleet.search.driven import plan_place
from tunefleet.storage import Place, place
from tunefleet.worker.events import Event
from tunefleet.worker.job import Job
from tunefleet.worker.leaving import Wish
from tunefleet.worker.run import run_worker
from tunefleet.worker.seat import Seat, prepare


class Alone:
    """What a worker finds where nobody listens (`worker.run.Surroundings` and its `Post`)."""

    def take_seat(self, plan: Plan) -> Seat:
        """Return the only seat."""
        prepare(plan)
        return Seat(0, 1, torch.device("cpu"))

    def post(self, seat: Seat) -> "Alone":
        """Return the line, which leads nowhere."""
        return self

    def gauges(self, job: Job, seat: Seat) -> None:
        """Show nothing."""

    def listen(self) -> None:
        """Note no signal."""

    def send(self, event: Event) -> None:
        """Tell nobody."""

    def wish(self) -> Wish | None:
        """Return that nobody wants anything."""
        return None

    def terminated(self) -> bool:
        """Return that no signal has come."""
        return False

    def preempted(self) -> bool:
        """Return that no notice has come."""
        return False

    def hand_over(self, checkpoint: Place, metrics: dict[str, Any]) -> None:
        """Keep no books."""

    def flush(self) -> None:
        """Have nothing to wait for."""


def run_trial(search: str, name: str) -> dict[str, float]:
    """Run a trial whose plan lies in a search's folder; return its losses.

    Raises:
        RuntimeError: it failed.
    """
    plan = Plan.model_validate_json(plan_place(place(search), name).read_text())
    folder = RunFolder(place(plan.place.storage_path).child(name))
    open_run(plan, folder)
    ending = run_worker(Job(plan, folder, f"trial {name}", claim_run(folder.claim)), Alone())
    if "failed" in ending:
        raise RuntimeError(f"{name}: {ending}")
    return {"loss": ending["loss"], "eval_loss": ending["eval_loss"]}
