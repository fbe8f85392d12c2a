"""What ends an attempt early, as one worker sees it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tunefleet.worker.leaving import Leaving, Watch, Wish
from tunefleet.worker.seat import Seat


@dataclass
class Outside:
    """What reaches the worker."""

    wished: Wish | None = None
    sigterm: bool = False
    notice: bool = False
    looks: int = 0

    def wish(self) -> Wish | None:
        return self.wished

    def terminated(self) -> bool:
        return self.sigterm

    def preempted(self) -> bool:
        self.looks += 1
        return self.notice


@dataclass
class Uploads:
    """What the watch needs of a `Saver`."""

    failed: bool = False
    arrived: bool = False
    settled: int = 0

    def settle(self) -> None:
        self.settled += 1
        if self.failed:
            raise OSError("the store is full")


SEAT = Seat(0, 1, torch.device("cpu"))


def watch(outside: Outside, uploads: Uploads | None = None, *, resumable: bool = True, longest_gap: int = 100) -> Watch:
    return Watch(outside, SEAT, uploads or Uploads(), resumable=resumable, longest_gap=longest_gap)


@pytest.mark.parametrize(
    ("outside", "expected"),
    [
        (Outside(), None),
        (Outside(wished="stop"), Leaving(False, "a signal to the driver")),
        (Outside(sigterm=True), Leaving(True, "worker 0 was sent SIGTERM")),
        (Outside(wished="grow"), Leaving(True, "there is room for more workers")),
        (Outside(wished="stop", sigterm=True), Leaving(False, "a signal to the driver")),
    ],
)
def test_reasons_to_end(outside: Outside, expected: Leaving | None) -> None:
    found = watch(outside)
    assert found.should_stop() == (expected is not None)
    if expected is not None:
        assert found.agreed() == expected


def test_a_run_that_cannot_be_resumed_only_stops() -> None:
    assert not watch(Outside(wished="grow", sigterm=True), resumable=False).should_stop()
    assert watch(Outside(wished="stop"), resumable=False).should_stop()
    outside = Outside(notice=True)
    assert watch(outside, resumable=False).look(1) is None
    assert outside.looks == 0


def test_a_checkpoint_that_failed_comes_up_at_the_next_step() -> None:
    found = watch(Outside(), Uploads(failed=True))
    assert found.should_stop()
    with pytest.raises(OSError, match="the store is full"):
        found.agreed()


def test_a_notice_is_found_and_what_has_arrived_is_settled() -> None:
    uploads = Uploads(arrived=True)
    assert watch(Outside(notice=True), uploads).look(1) == Leaving(True, "one of its nodes is about to be taken away")
    assert uploads.settled == 1


@pytest.mark.parametrize(
    ("seconds_a_step", "looked_at"),
    [(0.01, [1, 2, 12, 22]), (1.0, [1, 2, 7, 12, 17, 22]), (30.0, list(range(1, 25)))],
)
def test_slow_steps_are_looked_at_more_often(
    monkeypatch: pytest.MonkeyPatch, seconds_a_step: float, looked_at: list[int]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("tunefleet.worker.leaving.time.monotonic", lambda: clock[0])
    outside, seen = Outside(), []
    found = watch(outside, longest_gap=10)
    for step in range(1, 25):
        clock[0] += seconds_a_step
        before = outside.looks
        found.look(step)
        if outside.looks > before:
            seen.append(step)
    assert seen == looked_at
