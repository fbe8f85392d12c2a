"""Which trials are stopped before their end: Ray Tune's schedulers, counted in our own steps.

Ray's `training_iteration` begins anew whenever a trial is paused or begun again, so no scheduler counts by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from tunefleet.errors import Refused
from tunefleet.plan import CadencePlan
from tunefleet.recipe.tune import TuneSettings
from tunefleet.search.book import Book, Trial
from tunefleet.search.driven import RUNG, rung

NEVER: Any = float("inf")  # Ray declares a whole number, which would not be long enough before the first pause


@dataclass(frozen=True)
class Clock:
    """How trials are timed."""

    updates: int
    """Of a whole trial."""
    interval: int
    """Steps from one report to the next."""
    grace: int
    """Steps that every trial gets."""


def clock(tune: TuneSettings, updates: int | None, cadence: CadencePlan) -> Clock:
    """The clock of a search whose trials have so many updates and such a cadence.

    Raises:
        Refused: trials would be over before the first of them could be stopped.
    """
    evaluates = tune.metrics[0].startswith("eval_")
    interval = (cadence.evaluation if evaluates else cadence.logging) or cadence.logging
    updates = updates or 1
    if tune.grace_steps is not None and tune.grace_steps >= updates:
        raise Refused(
            f"tune.grace_steps: {tune.grace_steps} lets no trial be stopped, since a whole one has {updates} steps: "
            f"make it smaller, or write tune.scheduler: none."
        )
    return Clock(updates, min(interval, updates), min(tune.grace_steps or interval, updates))


def pauses(tune: TuneSettings) -> bool:
    """Whether trials are paused, to be gone on with."""
    return tune.scheduler == "hyperband"


def scheduler(tune: TuneSettings, time: Clock, book: Book) -> TrialScheduler:
    """The scheduler that a search asks for; in a tournament one for each branch, and none for repeats of finalists."""
    if tune.tournament:
        return Brackets(lambda: _scheduler(tune, time), book)
    return _scheduler(tune, time)


def _scheduler(tune: TuneSettings, time: Clock) -> TrialScheduler:
    aim: dict[str, Any] = {"metric": tune.metrics[0], "mode": tune.modes[0]}
    rungs: dict[str, Any] = {
        "time_attr": RUNG,
        "max_t": rung(time.updates, time.interval),
        "reduction_factor": tune.reduction_factor,
    }
    match tune.scheduler:
        case "asha":
            return AsyncHyperBandScheduler(
                time_attr="step",
                max_t=time.updates,
                grace_period=time.grace,
                reduction_factor=tune.reduction_factor,
                **aim,
            )
        case "hyperband":
            return HyperBandForBOHB(**rungs, **aim) if tune.search == "bohb" else HyperBandScheduler(**rungs, **aim)
        case "median":  # a time slice without end: it stops trials and pauses none
            return MedianStoppingRule(time_attr="step", grace_period=time.grace, min_time_slice=NEVER, **aim)
        case _:
            return FIFOScheduler()


class Brackets(FIFOScheduler):
    """Lets a scheduler of its own judge the trials of each branch, so that slow starters are compared with their kind.

    For schedulers that neither pause trials nor choose who runs.
    """

    def __init__(self, make: Callable[[], TrialScheduler], book: Book) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._make, self._book = make, book
        self._made: dict[int | None, TrialScheduler] = {}

    def _bracket(self, trial: RayTrial) -> TrialScheduler:
        kept = self._book.named(trial.config["trial"])
        branch = kept.branch if kept.repeats is None else None
        if branch not in self._made:
            self._made[branch] = FIFOScheduler() if branch is None else self._make()
        return self._made[branch]

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        """Take a trial into its bracket."""
        self._bracket(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """What its bracket decides."""
        return self._bracket(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        """Tell its bracket."""
        self._bracket(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        """Tell its bracket."""
        self._bracket(trial).on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: RayTrial) -> None:
        """Tell its bracket."""
        self._bracket(trial).on_trial_remove(tune_controller, trial)


def remember(made: TrialScheduler, tune: TuneSettings, ended: Iterable[Trial]) -> None:
    """Show a new scheduler what trials of earlier calls reported, so that it compares with them."""
    if tune.scheduler not in ("asha", "median"):
        return
    controller: Any = None  # neither of the two asks it anything when it takes a result in
    for trial in ended:
        stand_in = RayTrial("tunefleet", config={"trial": trial.name}, trial_id=trial.name, stub=True)
        reports = [report for report in trial.reports if report.get(tune.metrics[0]) is not None]
        if reports:
            made.on_trial_add(controller, stand_in)
            for report in reports[:-1]:
                made.on_trial_result(controller, stand_in, dict(report))
            made.on_trial_complete(controller, stand_in, dict(reports[-1]))
