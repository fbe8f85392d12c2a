"""The end of a search on a cluster that gives nodes back: its last trials share as few of them as hold them.

Ray lays placement groups over the emptiest nodes, and trials end where they are. So when nothing more will begin, nodes
are held that are mostly empty. A trial that has long to go then leaves such a node: it saves, goes on elsewhere from
that very step, and the autoscaler takes the node back when it has been idle for long enough.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from tunefleet.launch.cluster import alive_nodes
from tunefleet.search.board import Progress
from tunefleet.search.sizing import Size, fit
from tunefleet.shapes import ClusterShape, NodeShape

WORTH_SECONDS = 120.0
"""What a trial must still have to go: it starts anew, and its node stays for as long as an idle one may."""
LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Straggler:
    """A trial that still runs."""

    name: str
    nodes: tuple[str, ...]
    """Where its workers are, by Ray's names."""
    size: Size
    seconds_left: float | None
    """None where nobody knows yet."""


@dataclass(frozen=True)
class Use:
    """A node and what of it is taken."""

    whole: NodeShape
    free: Mapping[str, float]


def leaving(stragglers: Sequence[Straggler], uses: Mapping[str, Use], cluster: ClusterShape) -> dict[str, str]:
    """The node that each of some trials shall leave; nothing where that would free no node.

    The node that fewest must leave is emptied, the largest of such. Trials whose workers are on several nodes stay.
    """
    held = {one.nodes[0] for one in stragglers if len(one.nodes) == 1} & set(uses)
    spread = {node for one in stragglers if len(one.nodes) > 1 for node in one.nodes}

    def order(node: str) -> tuple[int, float]:
        return sum(node in one.nodes for one in stragglers), -sum(uses[node].whole.offered[name] for name in _COUNTED)

    for node in sorted(held - spread, key=order):
        own = [one for one in stragglers if node in one.nodes]
        if not all((one.seconds_left or 0.0) >= WORTH_SECONDS for one in own) or not _is_only_of(own, uses[node]):
            continue
        others = tuple(_rest(uses[other]) for other in (held | spread) - {node} if other in uses)
        rooms = ClusterShape(others, cpu=cluster.cpu)
        if fit([one.size for one in own], rooms):
            return {one.name: node for one in own}
    return {}


_COUNTED = ("CPU", "GPU")


def _is_only_of(trials: Sequence[Straggler], use: Use) -> bool:
    """Whether nobody else has anything of a node, so that it can go."""
    return all(
        abs(
            use.whole.offered[name]
            - use.free.get(name, 0.0)
            - sum(one.size.workers * one.size.request.get(name, 0.0) for one in trials)
        )
        < 1e-6
        for name in _COUNTED
    )


def _rest(use: Use) -> NodeShape:
    """What is free of a node, as a machine."""
    others = {name: use.free.get(name, 0.0) for name in use.whole.others or {}}
    return NodeShape(use.free.get("CPU", 0.0), use.free.get("GPU", 0.0), others, use.whole.labels)


class Packer:
    """Looks from time to time whether the trials that still run would fit on fewer nodes."""

    def __init__(self, cluster: ClusterShape) -> None:
        self._cluster = cluster
        self._looked = 0.0
        self._left: dict[str, str] = {}
        self._since: dict[str, tuple[float, int]] = {}

    def look(self, running: Mapping[str, Size], progress: Mapping[str, Progress]) -> dict[str, list[str]]:
        """The nodes that each of some trials shall go on without: its own, and those that are idle, which Ray prefers.

        Args:
            running: the trials that have workers, or wait for them.
            progress: how far each is.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return {}
        self._looked = now
        stragglers = [self._straggler(name, size, progress.get(name), now) for name, size in running.items()]
        if any(not one.nodes or self._left.get(one.name) in one.nodes for one in stragglers):
            return {}  # some are still on their way
        uses = self._uses()
        found = leaving(stragglers, uses, self._cluster)
        if self._left.keys() & found.keys():
            return {}  # nobody moves twice
        self._left |= found
        idle = uses.keys() - {node for one in stragglers for node in one.nodes}
        return {name: sorted({node, *idle}) for name, node in found.items()}

    def _straggler(self, name: str, size: Size, progress: Progress | None, now: float) -> Straggler:
        if progress is None:
            return Straggler(name, (), size, None)
        since, step = self._since.setdefault(name, (now, progress.step))
        done = progress.step - step
        left = (progress.updates - progress.step) * (now - since) / done if done > 0 else None
        return Straggler(name, progress.nodes, size, left)

    def _uses(self) -> dict[str, Use]:
        """Every node that is there."""
        free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
        return {name: Use(shape, free.get(name, {})) for name, shape in alive_nodes().items()}
