"""A Ray cluster of several nodes on this machine, whose nodes are added, drained and killed for real."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

_NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 10**8}


@dataclass(frozen=True)
class Nodes:
    """The cluster: a head without CPUs for work, and nodes with one each."""

    cluster: Cluster

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        """Start a node."""
        return self.cluster.add_node(**_NODE)

    def kill(self, node: Any) -> None:
        """Kill a node's raylet, and with it its workers, without a word."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: int) -> None:
        """Give notice that a node will be taken away, as a cloud does."""
        ray = str(Path(sys.executable).with_name("ray"))
        what = ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [ray, "drain-node", "--address", self.address, *what, "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


@contextmanager
def nodes() -> Iterator[Nodes]:
    """A cluster for as long as the block lasts. Main thread only."""
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Nodes(cluster)
    finally:
        cluster.shutdown()
