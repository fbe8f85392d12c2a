"""Which of the last trials move together, so that nodes can go."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tunefleet.hardware import Hardware
from tunefleet.search.board import Progress
from tunefleet.search.packing import WORTH_SECONDS, Packer, Straggler, Use, leaving
from tunefleet.search.sizing import Size
from tunefleet.shapes import SINGLE_WORKER, ClusterShape, NodeShape

CLUSTER = ClusterShape((), cpu=Hardware("cpu", bf16=True))
ONE, TWO = Size(1, {"CPU": 1.0}), Size(2, {"CPU": 1.0})


def use(whole: float, free: float, **labels: str) -> Use:
    return Use(
        NodeShape(whole, labels={name.replace("_", "-"): value for name, value in labels.items()}), {"CPU": free}
    )


def at(name: str, *nodes: str, size: Size = ONE, left: float | None = 1000.0) -> Straggler:
    return Straggler(name, nodes, size, left)


def test_of_two_nodes_that_are_half_empty_one_is_left() -> None:
    found = leaving([at("a", "x"), at("b", "y")], {"x": use(2, 1), "y": use(2, 1)}, CLUSTER)
    assert found in ({"a": "x"}, {"b": "y"})


def test_the_node_that_fewest_must_leave_is_left_and_of_such_the_largest() -> None:
    uses = {"x": use(4, 2), "y": use(4, 3)}
    assert leaving([at("a", "x"), at("b", "x"), at("c", "y")], uses, CLUSTER) == {"c": "y"}
    assert leaving([at("a", "x"), at("b", "y")], {"x": use(2, 1), "y": use(8, 7)}, CLUSTER) == {"b": "y"}
    whole = {"x": use(2, 1), "y": use(8, 6)}
    assert leaving([at("a", "x"), at("b", "y", size=TWO)], whole, CLUSTER) == {"a": "x"}, "two find no room on x"


def test_what_is_full_stays() -> None:
    assert leaving([at("a", "x"), at("b", "y")], {"x": use(1, 0), "y": use(1, 0)}, CLUSTER) == {}
    assert leaving([at("a", "x")], {"x": use(2, 1)}, CLUSTER) == {}


@pytest.mark.parametrize("left", [None, WORTH_SECONDS / 2])
def test_a_trial_that_is_nearly_done_does_not_move(left: float | None) -> None:
    uses = {"x": use(2, 1), "y": use(2, 1)}
    assert leaving([at("a", "x", left=left), at("b", "y", left=left)], uses, CLUSTER) == {}


def test_a_node_that_others_use_too_would_not_go() -> None:
    found = leaving([at("a", "x"), at("b", "y")], {"x": use(4, 2), "y": use(2, 1)}, CLUSTER)
    assert found == {"b": "y"}, "x has a CPU of somebody else's"


def test_trials_on_several_nodes_stay_and_keep_theirs() -> None:
    uses = {"x": use(2, 1), "y": use(2, 1), "z": use(2, 1)}
    assert leaving([at("a", "x", "y", size=TWO), at("b", "z")], uses, CLUSTER) == {"b": "z"}
    assert leaving([at("a", "x", "y", size=TWO)], uses, CLUSTER) == {}


def test_a_trial_that_is_kept_to_some_nodes_moves_among_them() -> None:
    alone = Size(1, {"CPU": 1.0}, {SINGLE_WORKER: "true"})
    plain = {"x": use(1, 0), "y": use(2, 1)}
    assert leaving([at("a", "x", size=alone), at("b", "y")], plain, CLUSTER) == {}


def test_nobody_moves_twice_and_one_move_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    packer, clock = Packer(CLUSTER), [0.0]
    uses = {"x": use(2, 1), "y": use(2, 1), "idle": use(2, 2)}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(packer, "_uses", lambda: uses)

    def look(a: str, b: str, step: int) -> dict[str, list[str]]:
        clock[0] += 10
        told: dict[str, Any] = {"a": Progress(step, 1000, 1.0, (a,)), "b": Progress(step, 1000, 1.0, (b,))}
        return packer.look({"a": ONE, "b": ONE}, told)

    assert look("x", "y", 10) == {}, "nobody knows how long they take"
    (moved,) = look("x", "y", 20).items()
    assert moved in (("a", ["idle", "x"]), ("b", ["idle", "y"])), "Ray would take the idle one"
    assert look("x", "y", 21) == {}, "it is on its way"
    uses |= {"x": use(2, 2), "y": use(2, 0)}
    assert look("y", "y", 30) == {}
    # The one that has moved is on a node that is larger now, and so would be the one to leave it.
    uses |= {"x": use(2, 1), "y": use(8, 7)}
    assert look(*(("y", "x") if moved[0] == "a" else ("x", "y")), 40) == {}
