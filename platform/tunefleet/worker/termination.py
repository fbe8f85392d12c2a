"""SIGTERM to a worker: noted, so that the run can save and go on elsewhere; the second one ends the process as before.

The training runs in a thread, and Python takes signal handlers in the main thread only. That is where Ray runs the
worker's actor tasks, and where it has put a handler of its own that ends the process at once. So the worker sends
itself a task that changes the handler.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import ray

_noted = threading.Event()


def listen() -> None:
    """Note SIGTERM from now on; to be called in the thread that trains."""
    actor: Any = ray.get_runtime_context().current_actor
    ray.get(actor.execute.remote(_install))


def terminated() -> bool:
    """Whether SIGTERM has come since `listen`."""
    return _noted.is_set()


def _install() -> None:
    """Runs in the main thread, which handles the signal when Ray next asks the worker how it is."""
    _noted.clear()
    before = signal.getsignal(signal.SIGTERM)

    def note(_number: int, _frame: FrameType | None) -> None:
        _noted.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
