"""A Ray head with a job server on this machine, as `ray start` makes one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests
from tests.s3_server import free_port

START_SECONDS = 120

Give = Callable[..., tuple[int, str]]
"""Gives a command in this process: its exit code, and what it printed."""


@dataclass(frozen=True)
class Head:
    """Where it is."""

    url: str
    home: Path
    """HOME of its processes, so of its jobs."""
    token: str | None = None

    @property
    def variables(self) -> dict[str, str]:
        """What a client has in its environment."""
        if self.token is None:
            return {"RAY_AUTH_MODE": "disabled"}
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextmanager
def job_server(
    home: Path, cpus: int = 2, token: str | None = None, programs: Path = Path(sys.executable).parent
) -> Iterator[Head]:
    """A head for as long as the block lasts.

    Args:
        token: what a client must show; None = nothing.
        programs: the folder of the `python` and the `ray` that the cluster has.
    """
    port = free_port()
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
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else it waits for half a minute at SIGTERM
        }
        if token is not None:
            environment["RAY_AUTH_TOKEN"] = token
        head = subprocess.Popen(
            [str(programs / "ray"), "start", "--head", "--block", *options],
            env=environment,
            cwd=home,  # where jobs that bring no folder write
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await(url, head)
            yield Head(url, home, token)
        finally:
            _end(head)


class Desk:
    """A person's folder, and the commands that are given there."""

    def __init__(self, folder: Path, head: Head) -> None:
        self.folder, self.head = folder, head

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Give a command to the cluster."""
        program = str(Path(sys.executable).with_name("tunefleet"))
        return subprocess.Popen(
            [program, *words, "--address", self.head.url],
            cwd=self.folder,
            env={**os.environ, **self.head.variables, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def give(self, *words: str, **environment: str) -> tuple[int, str]:
        """A command's exit code, and what it printed."""
        process = self.start(*words, **environment)
        text, _ = process.communicate(timeout=280)
        return process.returncode, text

    def logs(self, job: str) -> str:
        """What a job has printed so far."""
        headers = {} if self.head.token is None else {"Authorization": f"Bearer {self.head.token}"}
        answer = requests.get(f"{self.head.url}/api/jobs/{job}/logs", headers=headers, timeout=30)
        return str(answer.json()["logs"]) if answer.ok else ""

    def await_line(self, job: str, piece: str, seconds: float = 120) -> str:
        """Wait until a job has printed something; all that it has printed."""
        until = time.monotonic() + seconds
        while piece not in (text := self.logs(job)) and time.monotonic() < until:
            time.sleep(0.3)
        assert piece in text, text
        return text

    @property
    def storage(self) -> Path:
        return self.folder / "storage"


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


def _end(head: subprocess.Popen[bytes]) -> None:
    """End a head and all that it has started, the jobs of a test that broke off among them."""
    own: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        own = psutil.Process(head.pid).children(recursive=True)
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)
    for left in own:
        with suppress(psutil.NoSuchProcess):
            left.kill()


def bare_environment(folder: Path) -> Path:
    """An environment with the packages of this one beside tunefleet itself; the folder of its programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    own = Path(sysconfig.get_path("purelib"))
    packages = folder / own.relative_to(sys.prefix)
    for one in own.iterdir():
        if "tunefleet" not in one.name:
            (packages / one.name).symlink_to(one)
    script = folder / "bin" / "ray"
    script.write_text(f"#!{folder / 'bin' / 'python'}\nfrom ray.scripts.scripts import main\nmain()\n")
    script.chmod(0o755)
    return script.parent
