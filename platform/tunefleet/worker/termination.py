"""SIGTERM to a worker: noted, so that the run can save and go on elsewhere; the second one ends the process."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_noted = threading.Event()


def terminated() -> bool:
    """Whether SIGTERM has come since `note_sigterm`."""
    return _noted.is_set()


def note_sigterm() -> None:
    """Note SIGTERM from now on. Main thread only, which is where Python handles it."""
    _noted.clear()
    before = signal.getsignal(signal.SIGTERM)

    def note(_number: int, _frame: FrameType | None) -> None:
        _noted.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
