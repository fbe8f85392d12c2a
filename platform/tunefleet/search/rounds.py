"""The scheduler of populations: trials rest when they have come to the step of a comparison, and go on after it.

Ray's own `PopulationBasedTraining` cannot serve here: it takes no searcher that refuses points, copies whole
configurations (a donor's method too), compares trials at whatever steps they happen to be, and forgets its state when
the driver dies. This one holds no state: everything that it decides by is in the book.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tunefleet.search.book import Book, Trial
from tunefleet.search.points import PointSearcher, configuration
from tunefleet.search.population import Population
from tunefleet.search.sizing import Size, size_of


class Rounds(FIFOScheduler):
    """Pauses trials at the step that the book lets them train to, and makes the turns of populations that rest."""

    def __init__(self, population: Population, searcher: PointSearcher, book: Book) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._population, self._searcher, self._book = population, searcher, book
        self._sizes: dict[str, Size] = {}
        """Of trials that have taken another one's values over."""

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Pause a trial that has come as far as it may."""
        until = self._book.named(trial.config["trial"]).until
        rests = until is not None and int(result["step"]) >= until
        return TrialScheduler.PAUSE if rests else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """A new trial, else one that rests and may go on. When the search ends all may, to be told so."""
        trials: list[RayTrial] = tune_controller.get_trials()
        waiting = next((trial for trial in trials if trial.status == RayTrial.PENDING), None)
        if waiting is not None:
            return waiting
        resting = [trial for trial in trials if trial.status == RayTrial.PAUSED]
        if not self._searcher.closed:
            self._turn({trial.config["trial"] for trial in resting})
        for trial in resting:
            kept = self._book.named(trial.config["trial"])
            size = self._sizes.get(kept.name)
            if self._searcher.closed or (not _has_come(kept) and self._searcher.goes_on(trial.trial_id, size)):
                trial.set_config(configuration(kept))
                return trial
        return None

    def _turn(self, resting: set[str]) -> None:
        """Make the turn of every population that has come to its step."""
        members: dict[tuple[int, int | None], list[Trial]] = defaultdict(list)
        for trial in self._book.open_trials:
            members[trial.branch, trial.until].append(trial)
        for (branch, until), together in members.items():
            rest = all(trial.name in resting and _has_come(trial) for trial in together)
            if until is not None and rest and self._searcher.settled(branch):
                for name, plan in self._population.turn(together).items():
                    self._sizes[name] = size_of(plan.workers)


def _has_come(trial: Trial) -> bool:
    """Whether a trial is where it may train to."""
    return trial.until is not None and trial.steps >= trial.until
