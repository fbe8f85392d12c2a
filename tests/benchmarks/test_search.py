"""What the benchmark of short trials makes of its measurements."""

from __future__ import annotations

from typing import Any

import pytest
from search import Measured, equal, losses_table, missed, recipe, table, trained_seconds

from tunefleet.recipe.tune import search_from
from tunefleet.search.opening import open_space


def measured(seconds: float, loss: float = 1.5) -> Measured:
    return Measured(seconds, 1.0, {"trial_0001": [{"step": 4, "loss": 2.0}, {"step": 4, "eval_loss": loss}]})


@pytest.mark.parametrize("trials", [4, 8, 16])
def test_all_sides_search_the_same_points(trials: int) -> None:
    spaces = [open_space(search_from(recipe(side, "127.0.0.1:1", trials, 60))) for side in ("warm", "cold")]
    warm, cold = ([point.values for point in space.points()] for space in spaces)
    assert warm == cold
    assert len(warm) == trials


def test_goals_are_ratios_of_medians() -> None:
    rounds = {
        "warm": [measured(10), measured(99), measured(10)],
        "reuse_actors": [measured(13)],
        "cold": [measured(79)],
    }
    assert missed(rounds) == ["cold takes 7.90 times as long as warm, and the goal is 8.0"]
    assert "1.30x" in table(rounds, 16)


def test_losses_that_differ_in_one_bit_miss_the_goal() -> None:
    rounds = {"warm": [measured(10)], "cold": [measured(100, loss=1.5000000000000002)]}
    assert not equal(rounds)
    assert missed(rounds) == ["the losses differ"]
    assert "1.500000" in losses_table(rounds)


def test_training_is_what_the_updates_took() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 2, "loss": 1.0, "workers": {"step_seconds": [0.1]}},
        {"step": 2, "eval_loss": 1.0},
        {"step": 5, "loss": 1.0, "workers": {"step_seconds": [0.2]}},
    ]
    assert trained_seconds(lines) == pytest.approx(0.8)
