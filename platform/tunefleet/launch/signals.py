"""Ctrl-C and SIGTERM on the driver: the first asks the workers to save and stop, the second gives up at once.

Some senders mean one stop with two signals (`timeout` sends one to the process and one to its group), so what arrives
within a second of the first is part of it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME_WISH_SECONDS = 1.0


class StopWish:
    """Which signal has asked for a stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal if self.signal is not None else 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; break off at the next one that is not part of it.

        Raises:
            KeyboardInterrupt: a signal had come before.
        """
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > _SAME_WISH_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def stop_wishes() -> Iterator[StopWish]:
    """Turn SIGINT and SIGTERM into a `StopWish` while the block runs. Main thread only."""
    wish = StopWish()
    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, wish.receive) for number in watched}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
