"""What the benchmark of autoscaled searches makes of its measurements."""

from __future__ import annotations

from typing import Any

import pytest
from autoscale import SIDES, TYPES, Measured, bound, equal, missed, node_seconds, recipe, table
from tests.autoscaling import Life

from tunefleet.recipe.tune import search_from
from tunefleet.search.opening import open_space


def measured(node_seconds: float, seconds: float = 100.0, loss: float = 1.5) -> Measured:
    return Measured(seconds, node_seconds, 2, 2, 0, 60.0, {"trial_0001": loss})


def sides(**changed: Measured) -> dict[str, Measured]:
    plain = {"warm": 200.0, "cold": 260.0, "tuned": 280.0, "defaults": 560.0}
    return {side: measured(seconds) for side, seconds in plain.items()} | changed


@pytest.mark.parametrize("side", SIDES)
def test_every_side_searches_the_same_points_on_the_same_nodes(side: str) -> None:
    keys = recipe(side, "127.0.0.1:1", 7, 60)
    search = search_from(keys)
    assert sum(1 for _ in open_space(search).points()) == 7
    assert (search.tune.max_concurrent_trials, keys["ray_node_types"]) == (2, TYPES)
    assert search.tune.trial_host == ("warm" if side == "warm" else "cold")


def test_goals_are_shares_of_node_seconds_and_wall_time() -> None:
    assert missed(sides()) == []
    assert missed(sides(warm=measured(240.0))) == ["86% of the node-seconds of tuned; the goal is 80%"]
    assert missed(sides(warm=measured(200.0, seconds=111.0))) == ["111% of the wall time, and the goal is 110%"]
    late = missed(sides(defaults=measured(390.0)))
    assert late == ["51% of the node-seconds of defaults; the goal is 50%"]


def test_losses_that_differ_in_one_bit_miss_the_goal() -> None:
    assert not equal(sides(tuned=measured(280.0, loss=1.5000000000000002)))
    assert missed(sides(tuned=measured(280.0, loss=1.5000000000000002))) == ["the losses differ"]


def test_the_table_sets_each_side_against_the_others() -> None:
    (first, *_) = [line for line in table(sides()).splitlines() if "warm" in line]
    assert [cell.strip() for cell in first.split("|")[2:5]] == ["200", "71%", "36%"]
    one: dict[str, Any] = {"warm": measured(200.0)}
    assert table(one).count("%") == 0


def test_the_bound_is_the_updates_and_two_nodes_that_start_and_time_out() -> None:
    assert bound(sides(), idle_seconds=20.0, start_seconds=5.0) == 60 + 2 * 25


def test_a_node_that_stays_counts_until_it_could_have_gone() -> None:
    lives = [Life("a", "cpu", began=10.0, ended=130.0), Life("b", "cpu", began=30.0, ended=None)]
    assert node_seconds(lives, first_leave=120.0) == 120 + 90
