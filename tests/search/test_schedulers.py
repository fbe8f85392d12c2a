"""Schedulers count in our own steps, and remember what trials of an earlier call reported."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, HyperBandForBOHB, HyperBandScheduler, TrialScheduler
from tests.search.test_book import trial

from tunefleet.recipe.tune import TuneSettings, search_from
from tunefleet.search.schedulers import Clock, remember, rung, scheduler

CLOCK = Clock(updates=90, interval=10, grace=10)
CONTROLLER: Any = None


def settings(**block: object) -> TuneSettings:
    return search_from({"tune": {"space": "auto", **block}}).tune


def test_each_name_means_a_scheduler() -> None:
    assert isinstance(scheduler(settings(), CLOCK), FIFOScheduler)
    assert isinstance(scheduler(settings(scheduler="hyperband"), CLOCK), HyperBandScheduler)
    assert isinstance(scheduler(settings(scheduler="hyperband", search="bohb"), CLOCK), HyperBandForBOHB)


def asha() -> tuple[TrialScheduler, TuneSettings]:
    tune = settings(scheduler="asha")
    return scheduler(tune, CLOCK), tune


def decision(made: TrialScheduler, name: str, step: int, loss: float) -> str:
    one = RayTrial("tunefleet", trial_id=name, stub=True)
    made.on_trial_add(CONTROLLER, one)
    # Ray's own count has begun anew, as it does after every restart.
    return made.on_trial_result(CONTROLLER, one, {"step": step, "training_iteration": 1, "eval_loss": loss})


def test_asha_stops_at_rungs_of_steps() -> None:
    made, _ = asha()
    assert [decision(made, name, 10, loss) for name, loss in (("a", 1.0), ("b", 2.0), ("c", 0.9))] == [
        TrialScheduler.CONTINUE,
        TrialScheduler.STOP,
        TrialScheduler.CONTINUE,
    ]
    assert decision(made, "d", 5, 9.0) == TrialScheduler.CONTINUE  # before the first rung


@pytest.mark.parametrize("known", [True, False])
def test_asha_compares_with_trials_of_an_earlier_call(known: bool) -> None:
    made, tune = asha()
    if known:
        remember(made, tune, [trial(1, "finished", 1.0, 0.9), trial(2, "stopped", 1.5)])
    assert (decision(made, "new", 10, 1.4) == TrialScheduler.STOP) == known


def test_median_never_pauses_and_remembers() -> None:
    tune = settings(scheduler="median")
    made = scheduler(tune, CLOCK)
    remember(made, tune, [trial(number, "finished", 1.0, 1.0, 1.0) for number in (1, 2, 3)])
    assert decision(made, "worse", 20, 2.0) == TrialScheduler.STOP
    assert decision(made, "better", 20, 0.5) == TrialScheduler.CONTINUE


def test_rungs_are_intervals() -> None:
    assert [rung(step, 10) for step in (5, 10, 19, 90)] == [1, 1, 2, 9]
