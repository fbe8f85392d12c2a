"""The line between workers and driver: events one way, what the driver wants the other way.

`ray.train.report` is no such line: it is a barrier over all workers and takes about one report every two seconds.
Events travel as bytes, so that the mailbox's process need not load what they are made of.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from tunefleet.worker.beside import beside_driver
from tunefleet.worker.exits import end_surely
from tunefleet.worker.termination import terminated

if TYPE_CHECKING:
    from tunefleet.storage import Place
    from tunefleet.worker.events import Event
    from tunefleet.worker.leaving import Wish

_PUSH_INTERVAL_SECONDS = 0.2


class Mailbox:
    """State of the line. Lives in an actor of its own that takes no CPU."""

    def __init__(self) -> None:
        self._parcels: list[bytes] = []
        self._wish: Wish | None = None
        end_surely()

    def push(self, parcel: bytes) -> Wish | None:
        """Take events from a worker. Returns what the driver wants."""
        self._parcels.append(parcel)
        return self._wish

    def drain(self) -> list[bytes]:
        """Hand everything over to the driver."""
        parcels, self._parcels = self._parcels, []
        return parcels

    def want(self, wish: Wish | None) -> None:
        """Leave word for the workers."""
        self._wish = wish


def open_mailbox() -> Any:  # a Ray actor handle, which Ray does not type
    """Start a mailbox on this process's node, so that it lives as long as the driver, whichever other node goes."""
    return beside_driver(Mailbox)


def collect(mailbox: Any) -> list[Event]:
    """The events that have come since the last time, oldest first; for the driver."""
    return [event for parcel in ray.get(mailbox.drain.remote()) for event in unpack(parcel)]


def pack(events: Sequence[Event]) -> bytes:
    """Events as one parcel."""
    return pickle.dumps(list(events))


def unpack(parcel: bytes) -> list[Event]:
    """The events of a parcel. Only parcels of this run's own workers come here."""
    events: list[Event] = pickle.loads(parcel)
    return events


class Sender:
    """A worker's end. Sends at most every 0.2 s and never waits, so that training is not held up."""

    def __init__(self, mailbox: Any, active: bool) -> None:
        self._mailbox = mailbox
        self._active = active
        self._waiting: list[Event] = []
        self._answer: Any = None
        self._last_push = 0.0
        self._wish: Wish | None = None

    def send(self, event: Event) -> None:
        """Queue an event and push what has gathered, if the last push is long enough ago. Inactive ends drop it."""
        if not self._active:
            return
        self._waiting.append(event)
        if time.monotonic() - self._last_push >= _PUSH_INTERVAL_SECONDS:
            self._push()

    def wish(self) -> Wish | None:
        """What the driver wants, as far as this worker has heard. Never waits."""
        if self._active and time.monotonic() - self._last_push >= _PUSH_INTERVAL_SECONDS:
            self._push()
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._wish = ray.get(self._answer)
            self._answer = None
        return self._wish

    def terminated(self) -> bool:
        """Whether this process was sent SIGTERM."""
        return terminated()

    def preempted(self) -> bool:
        """Whether Ray has a notice that a node of this run is about to be taken away. A barrier over all workers."""
        from ray.train import get_preemption_info

        return get_preemption_info() is not None

    def hand_over(self, checkpoint: Place, metrics: dict[str, Any]) -> None:
        """Give Ray Train a checkpoint by name: it is in storage already. A barrier over all workers."""
        from ray.train import Checkpoint, CheckpointUploadMode, report  # the mailbox's own process needs none of it

        from tunefleet.stores import for_ray

        report(
            metrics,
            checkpoint=Checkpoint(checkpoint.path, for_ray(checkpoint.filesystem)) if self._active else None,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def flush(self) -> None:
        """Deliver everything and wait until it has arrived."""
        if self._active:
            ray.get(self._mailbox.push.remote(pack(self._waiting)))
            self._waiting = []

    def _push(self) -> None:
        if self._answer is not None and not ray.wait([self._answer], timeout=0)[0]:
            return
        if self._answer is not None:
            self._wish = ray.get(self._answer)
        self._answer = self._mailbox.push.remote(pack(self._waiting))
        self._waiting = []
        self._last_push = time.monotonic()
