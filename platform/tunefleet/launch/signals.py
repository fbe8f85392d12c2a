"""Ctrl-C and SIGTERM on the driver: the first asks the workers to save and stop, the second gives up at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopWish:
    """Which signal has asked for a stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal if self.signal is not None else 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; break off at the second.

        Raises:
            KeyboardInterrupt: a signal had come before.
        """
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


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
