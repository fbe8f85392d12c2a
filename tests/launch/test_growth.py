"""When an elastic run moves to more workers."""

from __future__ import annotations

import pytest

from tunefleet.launch import growth
from tunefleet.launch.growth import Growth
from tunefleet.plan import WorkerPlan
from tunefleet.shapes import NodeShape


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, NodeShape]:
    """The nodes of a cluster, to be changed."""
    alive: dict[str, NodeShape] = {"a": NodeShape(cpus=2)}
    monkeypatch.setattr(growth, "alive_nodes", lambda: dict(alive))
    return alive


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    shown = [0.0]
    monkeypatch.setattr("tunefleet.launch.growth.time.monotonic", lambda: shown[0])
    return shown


def elastic(least: int, most: int) -> Growth:
    workers = WorkerPlan(
        count=most, least=least, device="cpu", resources={"CPU": 2.0}, placement_strategy="PACK", threads=2
    )
    return Growth(workers, 60.0)


def looks(found: Growth, clock: list[float], until: float) -> list[float]:
    """When a driver that asks every second hears that it is time."""
    due = []
    while clock[0] < until:
        clock[0] += 1.0
        if found.is_due():
            due.append(clock[0])
    return due


def test_a_node_that_joins_is_used_once_it_has_been_there_for_a_while(
    nodes: dict[str, NodeShape], clock: list[float]
) -> None:
    found = elastic(1, 3)
    assert looks(found, clock, 100.0) == [], "nothing runs yet"
    found.started(1)
    assert looks(found, clock, 200.0) == []
    nodes["b"] = NodeShape(cpus=2)
    assert looks(found, clock, 300.0)[0] in (261.0, 262.0)
    found.moved()
    found.started(2)
    assert looks(found, clock, 500.0) == []


def test_nodes_that_gave_no_worker_are_not_tried_again(nodes: dict[str, NodeShape], clock: list[float]) -> None:
    """As one that is being drained: it is alive, and takes nobody."""
    found = elastic(1, 2)
    nodes["draining"] = NodeShape(cpus=2)
    found.moved()
    found.started(1)
    assert looks(found, clock, 200.0) == []
    nodes["new"] = NodeShape(cpus=2)
    assert looks(found, clock, 300.0)


def test_more_than_the_most_is_never_asked_for(nodes: dict[str, NodeShape], clock: list[float]) -> None:
    found = elastic(1, 2)
    found.started(2)
    nodes.update(b=NodeShape(cpus=8), c=NodeShape(cpus=8))
    assert looks(found, clock, 100.0) == []
    small = elastic(1, 4)
    small.started(1)
    nodes.clear()
    nodes.update(a=NodeShape(cpus=2), tiny=NodeShape(cpus=1))
    assert looks(small, clock, 300.0) == []
