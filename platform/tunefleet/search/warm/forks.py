"""Forks on demand: the ends of the line to a fork server (`server.py`), which has imported everything already.

A new process that trains imports for seconds; a fork of the server begins in milliseconds and shares its memory until
one of the two writes. The server is a process of its own, because only a process with one thread may be forked: one
that is connected to Ray has dozens, and their locks would stay locked in the fork. For the same reason it never touches
CUDA. Each fork has a connection of its own to whoever asked for it, and either end knows when the other one has died.

Light to import: a trial's host loads nothing of what trains.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, Literal

import tunefleet
import tunefleet_strategies
from tunefleet.errors import RunFailed

Role = Literal["trial", "worker"]
"""What a fork does: drive a trial, or make one attempt at its run."""
Stock = Sequence[Any]
"""What a server is made ready for: a `Plan` of each kind of trial, as JSON."""

_LOG = "log.txt"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",  # of the server: a fork has as many as its plan says
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asks the driver, and leaves CUDA alone
}
"""Variables of a process that stays with one thread."""
_END_SECONDS = 10.0


@dataclass(frozen=True)
class TrialOrder:
    """A trial on its way from its host."""

    name: str
    search: str
    """Where the search's folder is."""
    evaluates: bool
    interval: int
    address: str
    """Of the fork server."""
    node_id: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Fork:
    """A fork, as the one who asked for it sees it."""

    line: Connection
    pid: int

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def fork(address: str, role: Role, order: object) -> Fork:
    """A new fork of the server at an address, which is told what to do; waits until the server is ready.

    Raises:
        RunFailed: there is no such server any more.
    """
    try:
        line = Client(address, family="AF_UNIX")
        line.send((role, order))
        return Fork(line, line.recv())
    except (OSError, EOFError) as error:
        raise RunFailed(f"The process that forks trials has ended{last_words(address)}: the trial is lost.") from error


def shared_folder(address: str) -> str:
    """Where the trials of a server share what they begin from; gone with the server."""
    return str(Path(address).with_name("shared"))


def machine() -> str:
    """Where this process can share a fork server: one system, one view of its processes, one set of packages."""
    processes = Path("/proc/self/ns/pid")
    return f"{os.uname().nodename} {processes.readlink() if processes.is_symlink() else ''} {sys.prefix}"


def last_words(address: str) -> str:
    """What a server or its forks printed last, for an error's sentence."""
    with suppress(OSError):
        lines = Path(address).with_name(_LOG).read_text(errors="replace").strip().splitlines()
        return f" (it said: {lines[-1][:200]})" if lines else ""
    return ""


class ForkServer:
    """The process that forks, on this machine."""

    def __init__(self, address: str, process: subprocess.Popen[str]) -> None:
        self.address = address
        """A socket in a folder that only this user may enter."""
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def keep(self, stock: Stock) -> None:
        """Say what it shall have ready; it forks nothing before. Once."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the first fork will say
            self._process.stdin.write(json.dumps(stock) + "\n")
            self._process.stdin.flush()


@contextmanager
def fork_server() -> Iterator[ForkServer]:
    """A fork server for as long as the block lasts, or this process lives."""
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as name:
        folder = Path(name)
        address = str(folder / "forks")
        with socket.socket(socket.AF_UNIX) as listener, (folder / _LOG).open("w") as log:
            listener.bind(address)
            listener.listen(128)  # who comes while it is still importing waits
            process = subprocess.Popen(
                _command(listener.fileno()),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                pass_fds=(listener.fileno(),),
                env={**os.environ, **ONE_THREAD, "PYTHONPATH": _import_path()},
                start_new_session=True,  # Ctrl-C is for the driver, which lets trials save
            )
        try:
            yield ForkServer(address, process)
        finally:
            _end(process)


def _command(listener: int) -> Sequence[str]:
    return sys.executable, "-P", "-m", str(__package__), str(listener)


def _import_path() -> str:
    """This very code first, as it was imported here."""
    roots = [str(Path(package.__path__[0]).parent) for package in (tunefleet, tunefleet_strategies)]
    return os.pathsep.join([*dict.fromkeys(roots), *filter(None, [os.environ.get("PYTHONPATH")])])


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()  # wherever it is, also among its imports; forks end with their hosts
    with process:
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
