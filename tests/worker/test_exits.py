"""That a process of a run is gone when it has ended."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

HANGS = """
import ctypes

libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.pause, ctypes.c_void_p), None, None)  # waits for ever, as Ray's core at its end
"""
TELLS = """
import pickle

from tunefleet.launch.placement import TellsOfLoss

told = pickle.loads(pickle.dumps(TellsOfLoss("mailbox")))
assert told._mailbox == "mailbox"
"""


def started(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", HANGS + code])


def test_a_process_that_hangs_in_its_exit_is_ended() -> None:
    surely = started("from tunefleet.worker.exits import end_surely\nend_surely(1)")
    without = started("")
    try:
        assert surely.wait(30) == -signal.SIGALRM
        with pytest.raises(subprocess.TimeoutExpired):
            without.wait(0.5)
    finally:
        without.kill()
        without.wait()


@pytest.mark.parametrize("code", [TELLS, "from tunefleet.worker.mailbox import Mailbox\nMailbox()"])
def test_the_controller_and_the_mailbox_end_surely(code: str) -> None:
    """Each is told so where it lives."""
    seconds = "import tunefleet.worker.exits as exits\nexits.end_surely.__defaults__ = (1,)\n"
    assert started(seconds + code).wait(60) == -signal.SIGALRM
