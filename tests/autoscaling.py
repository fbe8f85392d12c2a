"""Ray's own autoscaler (v2) on this machine: a head without CPUs, and nodes that it starts and takes away again.

The nodes are raylets of Ray's `FakeMultiNodeProvider`; all else is what runs on a cluster. `AutoscalingCluster` of Ray
2.60 lacks a file that it reads, so the head is started by hand.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, and its stub leaves this out
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.core.generated import gcs_pb2
from ray.util import get_node_ip_address
from tests.s3_server import free_port

from tunefleet.shapes import TRIAL_DRIVER

NodeTypes = Mapping[str, Mapping[str, Any]]
"""As `ray_node_types` has them."""

_HEAD_TYPE = "ray.head.default"
_STORE_BYTES = 100_000_000
_START_SECONDS = 120
_END_SECONDS = 60
_messages: Any = gcs_pb2  # made by protoc without types


@dataclass(frozen=True)
class Life:
    """One node that the autoscaler started."""

    node_id: str
    type: str
    began: float
    """Seconds since the epoch, as all times here."""
    ended: float | None
    """None = it is still there."""

    def seconds(self, until: float) -> float:
        """How long it has been there by then."""
        return (until if self.ended is None else min(self.ended, until)) - self.began


@dataclass(frozen=True)
class Autoscaled:
    """The cluster."""

    address: str
    types: NodeTypes
    _head: psutil.Process

    def lives(self) -> list[Life]:
        """All nodes that there have been, the head apart, oldest first."""
        found = []
        for info in GcsClient(address=self.address).get_all_node_info(timeout=10).values():
            if not info.is_head_node:
                ended = info.end_time_ms / 1000 if info.state == _messages.GcsNodeInfo.DEAD else None
                found.append(Life(info.node_id.hex(), info.node_type_name, info.start_time_ms / 1000, ended))
        return sorted(found, key=lambda life: life.began)

    def alive(self) -> dict[str, str]:
        """The type of each node that is there, by its id."""
        return {life.node_id: life.type for life in self.lives() if life.ended is None}

    def kill(self, node_id: str) -> None:
        """Kill a node's raylet, which takes its workers along."""
        for process in self._head.children(recursive=True):
            with suppress(psutil.Error):
                own = process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node_id
                if own and process.name() == "raylet":
                    process.kill()
                    return
        raise AssertionError(f"no raylet of {node_id}")


def most_together(lives: list[Life], kind: str | None = None) -> int:
    """The most nodes, of all types or of one, that were there at the same time."""
    own = [life for life in lives if kind in (None, life.type)]
    return max((sum(_is_there(other, life.began) for other in own) for life in own), default=0)


def _is_there(life: Life, moment: float) -> bool:
    return life.began <= moment and (life.ended is None or life.ended > moment)


@contextmanager
def autoscaled(
    home: Path,
    types: NodeTypes,
    *,
    drivers: int,
    idle_seconds: float = 20.0,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Autoscaled]:
    """A cluster that has no node for workers yet, for as long as the block lasts.

    Args:
        home: HOME of its processes.
        drivers: seats for drivers of trials on the head.
        idle_seconds: after how long without work a node goes.
        variables: of the head's environment and so of all nodes'.
    """
    programs = Path(sys.executable).parent
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    # Sockets lie below the folder of temporary files, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ra", dir="/tmp") as temporary:
        config = Path(temporary) / "autoscaler.json"
        config.write_text(json.dumps(_config(address, types, drivers, idle_seconds)))
        options = [f"--port={port}", f"--dashboard-port={free_port()}", "--num-cpus=0", f"--temp-dir={temporary}"]
        options += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--autoscaling-config={config}"]
        options += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        options += ["--disable-usage-stats", f"--object-store-memory={_STORE_BYTES}"]
        options += [f"--resources={json.dumps({TRIAL_DRIVER: drivers})}"]
        own = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        environment = {
            **own,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(home),
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            **(variables or {}),
        }
        with (Path(temporary) / "head.log").open("w") as log:
            head = subprocess.Popen(
                [str(programs / "ray"), "start", "--head", "--block", *options],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            _await(address, head, Path(temporary) / "head.log")
            yield Autoscaled(address, types, psutil.Process(head.pid))
        finally:
            _end(head)


def _config(address: str, types: NodeTypes, drivers: int, idle_seconds: float) -> dict[str, Any]:
    """The file that `ray start` gives the autoscaler."""
    nodes: dict[str, Any] = {
        _HEAD_TYPE: {"resources": {"CPU": 0, TRIAL_DRIVER: drivers}, "node_config": {}, "max_workers": 0},
    }
    for name, one in types.items():
        nodes[name] = {
            "resources": {**one["resources"], "object_store_memory": _STORE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": one["max_workers"],
            "labels": dict(one.get("labels", {})),
        }
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    lists = [
        *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands"),
        *("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
    ]
    return {
        "cluster_name": "fake",
        "provider": provider,
        "available_node_types": nodes,
        "head_node_type": _HEAD_TYPE,
        "max_workers": sum(one["max_workers"] for one in types.values()),
        "idle_timeout_minutes": idle_seconds / 60,
        "upscaling_speed": 1.0,
        "file_mounts_sync_continuously": False,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in lists},
    }


def _await(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        assert head.poll() is None, f"the head did not start: {log.read_text()[-2000:]}"
        with suppress(Exception):
            if any(info.is_head_node for info in GcsClient(address=address).get_all_node_info(timeout=5).values()):
                return
        time.sleep(0.5)
    raise AssertionError("the head did not answer")


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head, its nodes and all that runs on them: by the processes that descend from it, and no others."""
    with suppress(psutil.NoSuchProcess):
        everyone = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(timeout=_END_SECONDS)
        for process in psutil.wait_procs(everyone, timeout=10)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    if head.poll() is None:
        head.kill()
        head.wait(timeout=_END_SECONDS)
