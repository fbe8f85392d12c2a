"""The walk over the blocks as a function of applied updates."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from tunefleet_strategies.optim.block_schedule import NEVER, BlockSchedule, SwitchMode

MODES: tuple[SwitchMode, ...] = ("ascending", "descending", "random", "fixed")


def visits(schedule: BlockSchedule, count: int) -> list[int]:
    return [schedule.block(visit * schedule.interval) for visit in range(count)]


@pytest.mark.parametrize(
    ("mode", "start", "expected"),
    [
        ("ascending", None, [0, 1, 2, 0, 1, 2, 0]),
        ("ascending", 2, [2, 0, 1, 2, 0, 1, 2]),
        ("descending", None, [2, 1, 0, 2, 1, 0, 2]),
        ("descending", 0, [0, 2, 1, 0, 2, 1, 0]),
        ("fixed", None, [0] * 7),
        ("fixed", 1, [1] * 7),
    ],
)
def test_orders(mode: SwitchMode, start: int | None, expected: list[int]) -> None:
    assert visits(BlockSchedule(3, 4, mode, start), 7) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", [None, 2])
def test_every_visit_has_exactly_k_updates_the_first_one_too(mode: SwitchMode, start: int | None) -> None:
    schedule = BlockSchedule(5, 3, mode, start, seed=4)
    blocks = [schedule.block(updates) for updates in range(60)]
    for visit in range(20):
        assert len(set(blocks[3 * visit : 3 * visit + 3])) == 1
    if mode in ("ascending", "descending"):
        assert {len(list(run)) for _, run in groupby(blocks)} == {3}


def test_random_visits_every_block_once_in_each_round_and_differs_between_rounds_and_seeds() -> None:
    schedule = BlockSchedule(6, 2, "random", seed=1)
    rounds = [tuple(visits(schedule, 60)[6 * number : 6 * number + 6]) for number in range(10)]
    assert all(sorted(one) == list(range(6)) for one in rounds)
    assert len(set(rounds)) > 5
    assert visits(BlockSchedule(6, 2, "random", seed=2), 60) != visits(schedule, 60)


def test_one_block_may_end_a_round_and_open_the_next() -> None:
    walked = visits(BlockSchedule(3, 1, "random", seed=0), 300)
    assert any(walked[i] == walked[i + 1] for i in range(2, 299, 3))


@pytest.mark.parametrize("start", range(4))
def test_random_begins_with_the_start_block_in_round_0_only(start: int) -> None:
    free, led = (BlockSchedule(4, 1, "random", block, seed=9) for block in (None, start))
    assert led.order(0)[0] == start
    assert [b for b in led.order(0) if b != start] == [b for b in free.order(0) if b != start]
    assert [led.order(number) for number in range(1, 6)] == [free.order(number) for number in range(1, 6)]


@pytest.mark.parametrize("mode", MODES)
def test_never_stays_on_the_first_block(mode: SwitchMode) -> None:
    schedule = BlockSchedule(4, NEVER, mode, 2)
    assert {schedule.block(updates) for updates in (0, 1, 49, 50, 10_000)} == {2}
    assert schedule.visited(10_000) == {2}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", [None, 1])
@pytest.mark.parametrize("interval", [1, 3, 7])
def test_visited_is_what_a_run_trains(mode: SwitchMode, start: int | None, interval: int) -> None:
    schedule = BlockSchedule(4, interval, mode, start, seed=3)
    for updates in (0, 1, 2, 3, 4, 6, 7, 8, 11, 12, 13, 28, 29, 100):
        assert schedule.visited(updates) == {schedule.block(u) for u in range(updates)}


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = visits(BlockSchedule(8, 2, "random", seed=1), 30)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert visits(BlockSchedule(8, 2, "random", seed=1), 30) == first
