"""Schedulers count in our own steps, and remember what trials of an earlier call reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, HyperBandForBOHB, HyperBandScheduler, TrialScheduler
from tests.search.test_book import trial

from tunefleet.errors import Refused
from tunefleet.plan import CadencePlan
from tunefleet.recipe.tune import TuneSettings, search_from
from tunefleet.search.book import Book
from tunefleet.search.driven import rung
from tunefleet.search.schedulers import Clock, clock, remember, scheduler
from tunefleet.storage import place

CLOCK = Clock(updates=90, interval=10, grace=10)
CONTROLLER: Any = None


def settings(**block: object) -> TuneSettings:
    return search_from({"tune": {"space": "auto", **block}}).tune


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(place(tmp_path))


def test_each_name_means_a_scheduler(book: Book) -> None:
    assert isinstance(scheduler(settings(), CLOCK, book), FIFOScheduler)
    assert isinstance(scheduler(settings(scheduler="hyperband"), CLOCK, book), HyperBandScheduler)
    assert isinstance(scheduler(settings(scheduler="hyperband", search="bohb"), CLOCK, book), HyperBandForBOHB)


def test_steps_that_every_trial_gets_are_fewer_than_it_has() -> None:
    cadence = CadencePlan(
        logging=10,
        saving=None,
        evaluation=30,
        evaluates_at_start=False,
        evaluates_at_end=True,
        preemption_notices=1,
    )
    assert clock(settings(scheduler="asha"), 90, cadence) == Clock(90, 30, 30)
    assert clock(settings(scheduler="asha", grace_steps=89), 90, cadence).grace == 89
    with pytest.raises(Refused, match="grace_steps: 90 lets no trial be stopped, since a whole one has 90 steps"):
        clock(settings(scheduler="asha", grace_steps=90), 90, cadence)


def decision(made: TrialScheduler, name: str, step: int, loss: float) -> str:
    one = RayTrial("tunefleet", config={"trial": name}, trial_id=name, stub=True)
    made.on_trial_add(CONTROLLER, one)
    # Ray's own count has begun anew, as it does after every restart.
    return made.on_trial_result(CONTROLLER, one, {"step": step, "training_iteration": 1, "eval_loss": loss})


def test_asha_stops_at_rungs_of_steps(book: Book) -> None:
    made = scheduler(settings(scheduler="asha"), CLOCK, book)
    assert [decision(made, name, 10, loss) for name, loss in (("a", 1.0), ("b", 2.0), ("c", 0.9))] == [
        TrialScheduler.CONTINUE,
        TrialScheduler.STOP,
        TrialScheduler.CONTINUE,
    ]
    assert decision(made, "d", 5, 9.0) == TrialScheduler.CONTINUE  # before the first rung


@pytest.mark.parametrize("known", [True, False])
def test_asha_compares_with_trials_of_an_earlier_call(known: bool, book: Book) -> None:
    tune = settings(scheduler="asha")
    made = scheduler(tune, CLOCK, book)
    if known:
        remember(made, tune, [trial(1, "finished", 1.0, 0.9), trial(2, "stopped", 1.5)])
    assert (decision(made, "new", 10, 1.4) == TrialScheduler.STOP) == known


def test_median_never_pauses_and_remembers(book: Book) -> None:
    tune = settings(scheduler="median")
    made = scheduler(tune, CLOCK, book)
    remember(made, tune, [trial(number, "finished", 1.0, 1.0, 1.0) for number in (1, 2, 3)])
    assert decision(made, "worse", 20, 2.0) == TrialScheduler.STOP
    assert decision(made, "better", 20, 0.5) == TrialScheduler.CONTINUE


def test_rungs_are_intervals() -> None:
    assert [rung(step, 10) for step in (5, 10, 19, 90)] == [1, 1, 2, 9]


def test_a_tournament_judges_each_method_by_its_own_kind_and_no_repeat(book: Book) -> None:
    """A method whose losses start higher loses no trial to one that starts lower; its own worse ones go."""
    fast = [replace(trial(number, "running"), branch=0) for number in (1, 2, 3)]
    slow = [replace(trial(number, "running", branch="badam"), branch=1) for number in (4, 5, 6)]
    again = replace(trial(7, "running"), branch=0, repeats=1, seed=43)
    book.trials = [*fast, *slow, again]
    made = scheduler(settings(scheduler="asha", tournament=True), CLOCK, book)
    reported = [decision(made, one.name, 10, 1.0 + one.number / 10) for one in fast]
    assert reported == [TrialScheduler.CONTINUE, TrialScheduler.STOP, TrialScheduler.STOP]
    reported = [decision(made, one.name, 10, 5.0 + one.number / 10) for one in slow]
    assert reported == [TrialScheduler.CONTINUE, TrialScheduler.STOP, TrialScheduler.STOP]
    assert decision(made, again.name, 10, 9.0) == TrialScheduler.CONTINUE


def test_the_brackets_of_a_tournament_remember_an_earlier_call(book: Book) -> None:
    tune = settings(scheduler="asha", tournament=True)
    before = [replace(trial(1, "finished", 1.0, 0.9), branch=0), replace(trial(2, "stopped", 1.5), branch=0)]
    new = [replace(trial(3, "running"), branch=0), replace(trial(4, "running", branch="badam"), branch=1)]
    book.trials = [*before, *new]
    made = scheduler(tune, CLOCK, book)
    remember(made, tune, before)
    reported = [decision(made, one.name, 10, 1.4) for one in new]
    assert reported == [TrialScheduler.STOP, TrialScheduler.CONTINUE]
