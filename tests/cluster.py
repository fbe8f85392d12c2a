"""Several Ray nodes on this machine, each a raylet of its own, that a test adds, kills and drains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# `ray.cluster_utils.Cluster` needs a main thread and leaves its mark on the process that makes it, so it has its own.
# It reads one JSON object a line and answers with one.
_HOST = """
import json, os, signal, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
nodes = {}
print(json.dumps(cluster.address), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if "add" in command:
        node = cluster.add_node(object_store_memory=100_000_000, **command["add"])
        nodes[node.node_id] = node
        print(json.dumps(node.node_id), flush=True)
    else:
        node = nodes.pop(command["kill"])
        pid = node.all_processes["raylet"][0].process.pid
        os.kill(pid, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)
        print(json.dumps(pid), flush=True)
cluster.shutdown()
"""

# The head would take 16 s to believe that a node is gone. A node that is slow to answer, as on a busy machine, is not.
_IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


@dataclass
class RayNodes:
    """A head that holds no work, and the nodes that a test gives it."""

    address: str
    _host: subprocess.Popen[str]

    def add(self, cpus: float = 1, home: Path | None = None, **resources: float) -> str:
        """Start a node; returns its id. `home` gives it a home folder, so a token cache, of its own."""
        more: dict[str, Any] = {"resources": resources} if resources else {}
        if home is not None:
            more["env_vars"] = {"HOME": str(home)}
        return str(self._ask({"add": {"num_cpus": cpus, **more}}))

    def kill(self, node: str) -> None:
        """Kill a node's raylet, which takes its workers along."""
        self._ask({"kill": node})

    def drain(self, node: str, seconds: int) -> None:
        """Give notice that a node will be taken away, as a cloud does."""
        ray = str(Path(sys.executable).with_name("ray"))
        what = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [ray, "drain-node", "--address", self.address, *what, "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def kill_workers(self) -> int:
        """Kill every worker of Ray Train at once; returns how many there were."""
        workers = [
            process
            for process in psutil.Process(self._host.pid).children(recursive=True)
            if process.name().startswith("ray::RayTrain")  # the system keeps 15 characters of a name
        ]
        for process in workers:
            process.kill()
        return len(workers)

    def processes(self) -> list[str]:
        """The names of all processes of this cluster, the workers' among them."""
        return [process.name() for process in psutil.Process(self._host.pid).children(recursive=True)]

    def _ask(self, command: dict[str, Any]) -> object:
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        self._host.stdin.write(json.dumps(command) + "\n")
        self._host.stdin.flush()
        answer: object = json.loads(self._host.stdout.readline())
        return answer


@contextmanager
def ray_nodes(*, dashboard: bool = False) -> Iterator[RayNodes]:
    """A cluster whose head has no CPUs, for as long as the block lasts.

    Args:
        dashboard: whether the head serves the dashboard, and with it the State API.
    """
    head = {"num_cpus": 0, "include_dashboard": dashboard, "object_store_memory": 100_000_000}
    host = subprocess.Popen(
        [sys.executable, "-c", _HOST, json.dumps(head)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | _IMPATIENT,
    )
    assert host.stdin is not None
    assert host.stdout is not None
    try:
        first = host.stdout.readline()
        assert first, "Ray did not start"
        yield RayNodes(json.loads(first), host)
    finally:
        host.stdin.close()
        host.wait(timeout=60)
