"""Each step once at a tracker, in order, whatever fails on the way; and nothing of a failure reaches training."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tunefleet.artifacts.metrics import Line
from tunefleet.artifacts.trackers.delivery import Delivery, without_credentials
from tunefleet.artifacts.trackers.tracker import End


@dataclass
class Shelf:
    """A tracker in memory, which outlives deliveries and fails as it is told."""

    name: str = "shelf"
    points: list[tuple[str, int, float]] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    opened: int = 0
    down: bool = False
    drop_answers: int = 0
    """So many points are still taken before the answer to one is lost."""
    stuck: threading.Event | None = None

    def open(self) -> None:
        if self.stuck is not None:
            self.stuck.wait()
        if self.down:
            raise ConnectionError("nobody answers at http://me:secret-word@shelf/")
        self.opened += 1

    def reached(self, curve: str) -> int:
        return max((step for name, step, _ in self.points if name == curve), default=-1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for curve, number in numbers.items():
            self.points.append((curve, step, number))
            if self.drop_answers:
                self.drop_answers -= 1
                if not self.drop_answers:
                    raise TimeoutError("the answer never came")

    def close(self, end: End) -> None:
        self.ends.append(end)


def line(step: int) -> Line:
    return {"step": step, "epoch": step / 8, "loss": 1 / step, "seconds": float(step), "mfu": None}


def evaluation(step: int) -> Line:
    return {"step": step, "epoch": step / 8, "eval_loss": 2 / step}


def steps(shelf: Shelf, curve: str) -> list[int]:
    return [step for name, step, _ in shelf.points if name == curve]


def delivered(shelf: Shelf, history: list[Line], lines: list[Line], end: End = "finished") -> list[str]:
    delivery = Delivery(shelf, history, retry_seconds=0.05)
    for one in lines:
        delivery.write(one)
    delivery.close(end)
    return delivery.complaints()


def test_lines_arrive_in_order_as_curves() -> None:
    shelf = Shelf()
    assert delivered(shelf, [], [line(1), evaluation(1), line(2)]) == []
    assert steps(shelf, "train/loss") == steps(shelf, "train/epoch") == [1, 2]
    assert steps(shelf, "eval/loss") == [1]
    assert {curve for curve, _, _ in shelf.points} == {"train/loss", "train/epoch", "eval/loss"}
    assert shelf.ends == ["finished"]


def test_after_a_resume_what_is_there_is_not_sent_again_and_what_was_lost_is() -> None:
    shelf = Shelf()
    # Killed at step 6, and lines 5 and 6 never arrived; the checkpoint was at step 3.
    delivered(shelf, [], [line(1), line(2), evaluation(2), line(3), line(4)], "failed")
    delivered(shelf, [line(1), line(2), evaluation(2), line(3)], [line(4), evaluation(4), line(5), line(6)])
    assert steps(shelf, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps(shelf, "eval/loss") == [2, 4]


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_point_whose_answer_was_lost_is_not_sent_twice(taken: int) -> None:
    shelf = Shelf(drop_answers=taken)
    delivery = Delivery(shelf, [], retry_seconds=0.05)
    for number in range(1, 6):
        delivery.write(line(number))
    until(lambda: len(shelf.points) == 10)
    delivery.close("finished")
    assert steps(shelf, "train/loss") == steps(shelf, "train/epoch") == [1, 2, 3, 4, 5]
    assert shelf.opened == 2


def test_a_tracker_that_is_down_is_complained_of_once_and_gets_everything_when_it_is_back() -> None:
    shelf = Shelf(down=True)
    delivery = Delivery(shelf, [line(1)], retry_seconds=0.05)
    time.sleep(0.3)  # several tries
    delivery.write(line(2))
    (said,) = delivery.complaints()
    assert said.startswith("shelf takes no lines (nobody answers at http://shelf/); training goes on")
    assert delivery.complaints() == []
    shelf.down = False
    until(lambda: len(shelf.points) == 4)
    delivery.close("finished")
    assert delivery.complaints() == []
    assert steps(shelf, "train/loss") == [1, 2]


def test_what_never_arrived_is_counted_at_the_end() -> None:
    said = delivered(Shelf(down=True), [line(1)], [line(2)])
    assert said[-1] == "2 lines have not arrived at shelf; metrics.jsonl holds all of them."


def test_a_tracker_that_never_answers_holds_nobody_up() -> None:
    shelf = Shelf(stuck=threading.Event())
    delivery = Delivery(shelf, [])
    began = time.monotonic()
    for number in range(1, 1001):
        delivery.write(line(number))
    assert time.monotonic() - began < 1.0
    delivery.close("stopped")
    assert time.monotonic() - began < 10.0
    assert delivery.complaints() == ["1000 lines have not arrived at shelf; metrics.jsonl holds all of them."]
    assert shelf.stuck is not None
    shelf.stuck.set()


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_credentials_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = "401 for 0123456789abcdef at https://user:word@host/path"
    assert without_credentials(text) == "401 for (hidden) at https://host/path"
