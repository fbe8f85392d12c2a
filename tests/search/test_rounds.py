"""The scheduler of populations: who rests, when a population turns, who goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler
from tests.search.test_points import METHODS, Desk

from tunefleet.search.book import Trial
from tunefleet.search.points import configuration
from tunefleet.search.rounds import Rounds


@dataclass
class Turns:
    """Notes whose turn it was, and lets them go on to their end."""

    made: list[list[int]] = field(default_factory=list)

    def turn(self, members: Sequence[Trial]) -> dict[str, Any]:
        self.made.append(sorted(trial.number for trial in members))
        for trial in members:
            trial.until = None
        return {}


@dataclass
class Controller:
    """The part of Ray's controller that a scheduler asks."""

    trials: list[RayTrial] = field(default_factory=list)

    def get_trials(self) -> list[RayTrial]:
        return self.trials


@dataclass
class Stage:
    desk: Desk
    turns: Turns
    rounds: Rounds
    controller: Controller

    def begin(self) -> RayTrial | None:
        """Start the next trial, if there is one."""
        identifier = f"t{len(self.controller.trials)}"
        taken = self.desk.take(identifier)
        if taken is None:
            return None
        began = RayTrial("tunefleet", config=configuration(taken), trial_id=identifier, stub=True)
        began.status = RayTrial.RUNNING
        self.controller.trials.append(began)
        return began

    def report(self, trial: RayTrial, step: int) -> str:
        """What becomes of a trial that reports, and of its book."""
        decided = self.rounds.on_trial_result(self.controller, trial, {"step": step})
        kept = self.desk.book.named(trial.config["trial"])
        kept.steps, kept.reports = step, [{"step": step, "eval_loss": 1.0}]
        if decided == TrialScheduler.PAUSE:
            trial.status = RayTrial.PAUSED
            self.desk.searcher.paused |= {trial.trial_id}
        return decided

    def choose(self) -> RayTrial | None:
        return self.rounds.choose_trial_to_run(self.controller)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Two branches of two trials on four CPUs, two at once."""
    desk = Desk(tmp_path, METHODS[:2], search="random", num_samples=4, scheduler="pbt", at_once=2)
    desk.searcher._until = 10
    turns = Turns()
    population: Any = turns
    return Stage(desk, turns, Rounds(population, desk.searcher, desk.book), Controller())


def test_trials_rest_where_they_are_compared_and_each_branch_turns_by_itself(stage: Stage) -> None:
    first, second = stage.begin(), stage.begin()  # one of each branch
    assert first is not None
    assert second is not None
    assert stage.begin() is None  # no room
    assert stage.report(first, 9) == TrialScheduler.CONTINUE
    assert stage.report(first, 10) == TrialScheduler.PAUSE
    assert stage.choose() is None
    assert stage.turns.made == []  # its branch shall have another one

    third = stage.begin()
    assert third is not None
    assert stage.report(third, 10) == TrialScheduler.PAUSE
    assert stage.choose() is first
    assert stage.turns.made == [[1, 3]]
    assert first.config == {"trial": stage.desk.book.trials[0].name}
    assert stage.desk.book.trials[1].until == 10  # the other branch trains on


def test_a_trial_that_has_ended_is_not_waited_for(stage: Stage) -> None:
    stage.desk.searcher._most = 4
    trials = [trial for trial in (stage.begin() for _ in range(4)) if trial is not None]
    for trial in trials[:1]:
        stage.report(trial, 10)
    stage.choose()
    assert stage.turns.made == []
    stage.desk.book.trials[2].state = "failed"
    stage.choose()
    assert stage.turns.made == [[1]]


def test_no_one_goes_on_without_room(stage: Stage) -> None:
    first, second = stage.begin(), stage.begin()
    assert first is not None
    assert second is not None
    stage.report(first, 10)
    third = stage.begin()
    assert third is not None
    stage.report(third, 10)
    stage.desk.searcher._most = 1  # the trial of the other branch has it
    assert stage.choose() is None
    assert stage.turns.made == [[1, 3]]
    stage.desk.searcher._most = 2
    assert stage.choose() is first


def test_when_the_search_ends_all_are_told_and_none_turns(stage: Stage) -> None:
    first, _, third = stage.begin(), stage.begin(), None
    assert first is not None
    stage.report(first, 10)
    third = stage.begin()
    assert third is not None
    stage.report(third, 10)
    stage.desk.searcher.closed = True
    assert stage.choose() is first
    assert stage.turns.made == []


def test_who_rested_before_a_kill_says_so_without_training(stage: Stage) -> None:
    first = stage.begin()
    assert first is not None
    stage.report(first, 10)
    (kept,) = stage.desk.book.trials
    assert configuration(kept) == {"trial": kept.name, "until": 10, "rested": {"step": 10, "eval_loss": 1.0}}
