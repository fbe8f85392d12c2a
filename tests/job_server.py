"""A Ray head with a job server on this machine, as `ray start` makes one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from tests.s3_server import free_port

START_SECONDS = 120


@dataclass(frozen=True)
class Head:
    """Where it is."""

    url: str
    home: Path
    """HOME of its processes, so of its jobs."""


@contextmanager
def job_server(home: Path, cpus: int = 2, token: str | None = None) -> Iterator[Head]:
    """A head for as long as the block lasts.

    Args:
        token: what a client must show; None = nothing.
    """
    port = free_port()
    programs = Path(sys.executable).parent
    # Sockets lie below the folder of temporary files, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="rh", dir="/tmp") as temporary:
        options = [f"--port={free_port()}", f"--dashboard-port={port}", f"--num-cpus={cpus}"]
        options += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={temporary}"]
        # Ports that Ray would take at fixed numbers, where another cluster of this machine may be.
        options += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        options += ["--disable-usage-stats", "--object-store-memory=200000000"]
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(home),
            "RAY_AUTH_MODE": "disabled" if token is None else "token",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
        }
        if token is not None:
            environment["RAY_AUTH_TOKEN"] = token
        head = subprocess.Popen(
            [str(programs / "ray"), "start", "--head", "--block", *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await(url, head)
            yield Head(url, home)
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)


def _await(url: str, head: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert head.poll() is None, "the head did not start"
        try:
            if requests.get(f"{url}/api/version", timeout=2).status_code in (200, 401, 403):
                return
        except requests.exceptions.RequestException:
            pass
        time.sleep(0.2)
    raise AssertionError("the job server did not answer")
