"""Why an attempt ends before the run does, seen at update boundaries and agreed by all ranks.

A person may want the run to stop. Or it must go on elsewhere: the node is being taken away, somebody wants this process
to end, or there is room for more workers. Then the ranks save and return, and the driver starts the next attempt, which
goes on from that very step: no step is lost, and no failure is counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from tunefleet.worker.seat import Seat

Wish = Literal["stop", "grow", "move"]
"""What the driver may want of the workers: an end, a new start on more of them, or one on other nodes."""
_MOVES: Mapping[Wish, str] = {
    "grow": "there is room for more workers",
    "move": "it can share a node with others, and its own can go",
}

LOOK_SECONDS = 5.0
"""How often ranks ask each other about notices, which is a barrier. Clouds give half a minute or more."""


@dataclass(frozen=True)
class Leaving:
    """An attempt that ends before the run does."""

    moves: bool
    """Whether the run goes on elsewhere at once; else a person wanted it to stop."""
    why: str


class Messages(Protocol):
    """What reaches a rank from outside (`mailbox.Sender`)."""

    def wish(self) -> Wish | None:
        """What the driver wants, as far as this rank has heard."""

    def terminated(self) -> bool:
        """Whether this process was sent SIGTERM."""

    def preempted(self) -> bool:
        """Whether a node of this run is about to be taken away. Collective, and the same on all ranks."""


class Uploads(Protocol):
    """The checkpoints under way (`saving.Saver`)."""

    @property
    def arrived(self) -> bool: ...
    @property
    def failed(self) -> bool: ...
    def settle(self) -> None: ...


class Watch:
    """Looks for what ends an attempt early."""

    def __init__(self, messages: Messages, seat: Seat, saver: Uploads, *, resumable: bool, longest_gap: int) -> None:
        """
        Args:
            resumable: whether a run could go on elsewhere at all.
            longest_gap: updates between two looks at notices, at most.
        """
        self._messages = messages
        self._seat = seat
        self._saver = saver
        self._resumable = resumable
        self._longest_gap = longest_gap
        self._looked: tuple[float, int] | None = None
        self._next = 0

    def should_stop(self) -> bool:
        """Whether this rank has a reason to end after the present update."""
        return self._saver.failed or self._own() is not None

    def agreed(self) -> Leaving:
        """The reason, once one rank or more had one. Collective.

        Raises:
            Exception: what a checkpoint came to that did not arrive, on every rank.
        """
        if any(self._seat.from_all(lambda: self._saver.failed)):
            self._saver.settle()
        reasons = [reason for reason in self._seat.from_all(self._own) if reason is not None]
        return min(reasons, key=lambda reason: reason.moves)

    def look(self, step: int) -> Leaving | None:
        """Look for a notice, and settle what has arrived, if it is time to. Collective."""
        if step < self._next:
            return None
        noticed = self._resumable and self._messages.preempted()
        told = self._seat.from_all(lambda: (self._gap(step), self._saver.arrived))
        self._next = step + told[0][0]
        if all(arrived for _, arrived in told):
            self._saver.settle()
        return Leaving(True, "one of its nodes is about to be taken away") if noticed else None

    def _own(self) -> Leaving | None:
        wish = self._messages.wish()
        if wish == "stop":
            return Leaving(False, "a signal to the driver")
        if not self._resumable:
            return None
        if self._messages.terminated():
            return Leaving(True, f"worker {self._seat.rank} was sent SIGTERM")
        return None if wish is None else Leaving(True, _MOVES[wish])

    def _gap(self, step: int) -> int:
        """Updates that take about `LOOK_SECONDS`, by those since the last look."""
        now, before = time.monotonic(), self._looked
        self._looked = (now, step)
        if before is None or step <= before[1]:
            return 1
        pace = (now - before[0]) / (step - before[1])
        return max(1, min(self._longest_gap, int(LOOK_SECONDS / max(pace, 1e-6))))
