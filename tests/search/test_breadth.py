"""How many trials run at once, on clusters that grow and on others."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune.execution.tune_controller import _get_max_pending_trials
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from tunefleet.hardware import Hardware
from tunefleet.recipe.tune import TuneSettings
from tunefleet.search.breadth import Breadth, all_may_wait, breadth
from tunefleet.search.sizing import Size
from tunefleet.shapes import ClusterShape, NodeShape, NodeType, at_most

HEAD = NodeShape(0)
KIND = NodeType("cpu", NodeShape(2), most=3)
CPU = Hardware("cpu", bf16=True)
FROM_NOTHING = ClusterShape((HEAD,), cpu=CPU, may_grow=True)
TYPED = ClusterShape(at_most([HEAD], [KIND]), cpu=CPU, may_grow=True, node_types=(KIND,))
STANDING = ClusterShape((HEAD, NodeShape(2)), cpu=CPU, may_grow=True)
ONE = Size(1, {"CPU": 1.0})


def wide(cluster: ClusterShape, at_once: Any, trials: int = 20, seats: int | None = None) -> Breadth:
    settings = TuneSettings(max_concurrent_trials=at_once, space={"lora_rank": 8})
    return breadth(settings, ONE, cluster, trials, seats)


@pytest.mark.parametrize(
    ("at_once", "trials", "most", "limit"), [("auto", 20, 6, None), ("auto", 4, 4, None), (5, 20, 5, 5), (9, 20, 6, 9)]
)
def test_what_the_cluster_may_become_counts_and_not_what_it_is(
    at_once: Any, trials: int, most: int, limit: int | None
) -> None:
    assert wide(TYPED, at_once, trials) == Breadth(most, limit, TYPED)


def test_a_cluster_that_is_what_it_is() -> None:
    assert wide(STANDING, "auto") == Breadth(2, None, STANDING)
    assert wide(STANDING, 5) == Breadth(2, 5, STANDING)


def test_a_number_is_believed_where_the_cluster_is_empty_and_says_nothing() -> None:
    assert wide(FROM_NOTHING, 5) == Breadth(5, 5, None)
    alone = wide(FROM_NOTHING, "auto")
    assert (alone.most, alone.limit, alone.cluster) == (1, 1, None)
    assert "write ray_node_types" in str(alone.notice)


def test_trials_wait_for_no_seat() -> None:
    seated = wide(TYPED, "auto", seats=4)
    assert (seated.most, seated.limit) == (4, 4)
    assert "4 seats" in str(seated.notice)
    assert wide(TYPED, 3, seats=4).notice is None


def test_as_many_trials_wait_for_their_places_as_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a searcher that is not its own Ray Tune lets one trial wait, so that a cluster would grow node by node."""
    monkeypatch.delenv("TUNE_MAX_PENDING_TRIALS_PG", raising=False)
    search = SearchGenerator(Searcher())
    assert _get_max_pending_trials(search) == 1
    with all_may_wait(7):
        assert _get_max_pending_trials(search) == 7
    assert _get_max_pending_trials(search) == 1
    monkeypatch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "3")
    with all_may_wait(7):
        assert _get_max_pending_trials(search) == 3, "a person has said it"
