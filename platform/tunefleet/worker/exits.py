"""That a process of a run is gone when it has ended."""

import atexit
import signal

_SECONDS = 60


def end_surely(seconds: int = _SECONDS) -> None:
    """Let the kernel end this process where its own exit takes longer than so many seconds.

    An actor that ends by itself destroys Ray's core in C's exit handlers. In Ray 2.60 a publisher there may ask for a
    lock that is already destroyed and wait for ever; Ray counts the actor as dead and its process stays, even when Ray
    has ended. Seen in one of 49 runs, in Ray Train's controller. Python's exit handlers come before C's.
    """
    atexit.register(signal.alarm, seconds)  # SIGALRM ends a process that has not asked for it
