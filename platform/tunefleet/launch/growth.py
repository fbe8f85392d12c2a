"""When an elastic run starts anew on more workers: the cluster has room for them, and did not have it before."""

from __future__ import annotations

import time

from tunefleet.launch.cluster import alive_nodes
from tunefleet.plan import WorkerPlan

LOOK_SECONDS = 2.0


class Growth:
    """Looks for room, from time to time."""

    def __init__(self, workers: WorkerPlan, patience_seconds: float) -> None:
        """
        Args:
            patience_seconds: how long a node must have been there before it is worth a new start.
        """
        self._workers = workers
        self._patience_seconds = patience_seconds
        self._looked = 0.0
        self._nodes: frozenset[str] = frozenset()
        self._since = 0.0
        self._tried: set[frozenset[str]] = set()
        self._world: int | None = None

    def started(self, world: int) -> None:
        """So many workers have started."""
        self._world = world

    def is_due(self) -> bool:
        """Whether the run should move to more workers than there are."""
        now = time.monotonic()
        if self._world is None or self._world >= self._workers.count or now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        nodes = alive_nodes()
        if self._nodes != nodes.keys():
            self._nodes, self._since = frozenset(nodes), now
        room = sum(node.fits(self._workers.resources) for node in nodes.values())
        settled = now - self._since >= self._patience_seconds
        return settled and min(room, self._workers.count) > self._world and self._nodes not in self._tried

    def moved(self) -> None:
        """The run moves: what the nodes at hand give, it gets now. Only other ones are worth another move.

        Among them may be one that is being taken away and takes no workers any more.
        """
        self._tried.add(frozenset(alive_nodes()))
        self._world = None
