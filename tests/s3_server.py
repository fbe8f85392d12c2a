"""A real S3 server on this machine (moto's), and a way to it that can be cut."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import requests

REGION = "us-east-1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Server:
    """A server that keeps buckets in its memory."""

    port: int

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self, service: str = "s3") -> Any:
        return boto3.client(
            service,
            endpoint_url=f"http://{self.host}",
            region_name=REGION,
        )

    def bucket(self, name: str, host: str | None = None) -> str:
        """Make a bucket; gives its URI, by way of another host if one is named."""
        self.client().create_bucket(Bucket=name)
        return uri(name, host or self.host)

    def objects(self, bucket: str) -> dict[str, int]:
        """Every object of a bucket with its bytes; the markers of folders are none."""
        found = self.client().list_objects_v2(Bucket=bucket).get("Contents", [])
        return {one["Key"]: one["Size"] for one in found if not one["Key"].endswith("/")}

    def demand_credentials(self, after: int = 0) -> None:
        """Refuse keys that the server does not know, from so many requests on. Before, it takes any."""
        address = f"http://{self.host}/moto-api/reset-auth"
        requests.post(address, data=str(after).encode(), timeout=10).raise_for_status()


def uri(path: str, host: str) -> str:
    return f"s3://{path}?region={REGION}&scheme=http&endpoint_override={host}"


@contextmanager
def s3_server() -> Iterator[Server]:
    """Start a server and stop it at the end."""
    port = free_port()
    program = Path(sys.executable).with_name("moto_server")
    process = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "1000000000"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield Server(port)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "moto_server did not start"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("moto_server did not answer")


class Way:
    """A port that leads to a server, until it is cut: then connections break, and new ones are refused."""

    def __init__(self, server: Server) -> None:
        self.passed_bytes = 0
        self.refused_bytes_from: int | None = None
        """Cut the way by itself once so many bytes have gone to the server."""
        self._server = server
        self._port = free_port()
        self._selector = selectors.DefaultSelector()
        self._partner: dict[socket.socket, socket.socket] = {}
        self._to_server: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._open = True
        self._lock = threading.Lock()
        self.mend()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def is_cut(self) -> bool:
        return self._listener is None

    def cut(self) -> None:
        """The server is gone, as far as anybody sees."""
        with self._lock:
            self._cut()

    def mend(self) -> None:
        """The server is back."""
        with self._lock:
            self.refused_bytes_from = None
            self._listener = socket.create_server(("127.0.0.1", self._port))
            self._selector.register(self._listener, selectors.EVENT_READ)

    def close(self) -> None:
        self._open = False
        self._thread.join(10)
        self.cut()

    def _cut(self) -> None:
        if self._listener is not None:
            self._drop(self._listener)
            self._listener = None
        for end in list(self._partner):
            self._drop(end)
        self._partner.clear()
        self._to_server.clear()

    def _drop(self, end: socket.socket) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(end)
        end.close()

    def _run(self) -> None:
        while self._open:
            for key, _ in self._selector.select(timeout=0.05):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._partner:
                        self._pass_on(key.fileobj)

    def _accept(self) -> None:
        assert self._listener is not None
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._server.port))
        self._partner |= {near: far, far: near}
        self._to_server.add(near)
        for end in (near, far):
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        other = self._partner[end]
        try:
            piece = end.recv(65536)
            if piece:
                other.sendall(piece)
        except OSError:
            piece = b""
        if not piece:
            for one in (end, other):
                self._partner.pop(one, None)
                self._to_server.discard(one)
                self._drop(one)
            return
        if end in self._to_server:
            self.passed_bytes += len(piece)
            if self.refused_bytes_from is not None and self.passed_bytes >= self.refused_bytes_from:
                self._cut()
