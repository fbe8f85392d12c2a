"""Who is named a straggler, and who is not."""

from __future__ import annotations

import pytest

from tunefleet.worker.stragglers import LINES, SLOW, StragglerWatch, slowness

NAN = float("nan")


def named(*lines: list[float]) -> list[str]:
    """What is said over these lines, after a first one in which everything is slow."""
    watch = StragglerWatch([f"node{rank}" for rank in range(len(lines[0]))])
    assert watch.look([9.0, *[1.0] * (len(lines[0]) - 1)]) == []
    return [sentence for line in lines for sentence in watch.look(line)]


def test_a_worker_that_stays_slow_is_named_once_with_its_node_and_by_how_much() -> None:
    (sentence,) = named(*[[1.0, 1.1, 2.0]] * (LINES + 3))
    assert sentence.startswith("Rank 2 on node2 is a straggler: its own work took 1.9 times what the other workers")


def test_of_two_workers_the_slower_is_compared_with_the_other() -> None:
    (sentence,) = named(*[[1.3, 1.0]] * LINES)
    assert sentence.startswith("Rank 0 on node0")
    assert "1.3 times" in sentence


@pytest.mark.parametrize(
    "lines",
    [
        [[1.0, 2.0]] * (LINES - 1) + [[1.0, 1.0]] + [[1.0, 2.0]] * (LINES - 1),
        [[1.0, SLOW - 0.01]] * 9,
        [[1.0, NAN]] * 9,
        [[NAN, NAN]] * 9,
        [[1.0]] * 9,
    ],
    ids=["with a break", "a little", "unknown", "all unknown", "alone"],
)
def test_who_is_slow_for_a_while_or_a_little_or_unknown_is_not_named(lines: list[list[float]]) -> None:
    assert named(*lines) == []


def test_who_recovered_may_be_named_again() -> None:
    slow = [[1.0, 2.0]] * LINES
    assert len(named(*slow, [1.0, 1.0], *slow)) == 2


def test_one_slow_worker_does_not_make_others_look_slow() -> None:
    assert slowness([1.0, 1.0, 1.0, 10.0]) == [1.0, 1.0, 1.0, 10.0]
