"""A worker's place among the others: rank, device, and the few words that ranks exchange outside the training loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tunefleet.errors import PeerFailed, Refused, RunFailed, Superseded
from tunefleet.places import too_many_workers
from tunefleet.plan import Plan
from tunefleet.training.determinism import pin
from tunefleet_strategies.errors import StrategyError

_T = TypeVar("_T")

_LONGEST_UPLOAD = timedelta(days=1)
"""How long ranks wait for the slowest of them to bring its files: a rank that dies meanwhile is noticed at once."""


@dataclass(frozen=True)
class Seat:
    """Where this process sits."""

    rank: int
    world: int
    device: torch.device
    local_rank: int = 0
    """The number among the ranks of this node."""
    node: int = 0
    """The number of this node among those of the run."""
    node_id: str = ""
    """Ray's name of this node."""
    group: dist.ProcessGroup | None = None
    """Where the ranks talk; None = where the training does."""

    def aside(self) -> Seat:
        """The same ranks on a line of their own, for a thread beside the training. Collective."""
        if self.world == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=_LONGEST_UPLOAD))

    @property
    def leads(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def from_leader(self, work: Callable[[], _T]) -> _T:
        """What `work` returns on rank 0, on every rank; where it fails, it fails on all. Collective.

        Raises:
            Exception: as `together`.
        """
        box: list[Any] = [self.together(lambda: work() if self.leads else None)]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        told: _T = box[0]
        return told

    def from_all(self, work: Callable[[], _T]) -> list[_T]:
        """What `work` returns on every rank, by rank; where it fails on one, it fails on all. Collective.

        Raises:
            Exception: as `together`.
        """
        own = self.together(work)
        told: list[Any] = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(told, own, group=self.group)
        return told

    def from_node(self, work: Callable[[], _T]) -> _T:
        """What `work` returns on the first rank of this node, where alone it is done. Collective.

        Raises:
            Exception: as `together`.
        """
        first = self.local_rank == 0
        everybody: list[tuple[int, bool, Any]] = self.from_all(lambda: (self.node, first, work() if first else None))
        told: list[_T] = [result for node, leads, result in everybody if leads and node == self.node]
        return told[0]

    def together(self, work: Callable[[], _T]) -> _T:
        """Do `work` on every rank; where it fails on one, fail on all, so that none waits for one that gave up.

        Raises:
            Exception: what `work` raised here.
            Refused, RunFailed, Superseded, PeerFailed: what it raised on another rank.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as caught:  # raised again below, once every rank knows
            error = caught
        told: list[tuple[type[Exception], str] | None] = [None] * self.world
        if self.world > 1:
            own = None if error is None else (_echo(error), str(error))
            dist.all_gather_object(told, own, group=self.group)
        if error is not None:
            raise error
        for rank, failed in enumerate(told):
            if failed is not None:
                kind, message = failed
                raise kind(f"Rank {rank} failed: {message}")
        finished: _T = result
        return finished


def _echo(error: Exception) -> type[Exception]:
    """What an error is on the ranks that did not meet it."""
    if isinstance(error, Refused | StrategyError):
        return Refused
    known = (kind for kind in (Superseded, RunFailed) if isinstance(error, kind))
    return next(known, PeerFailed)


def prepare(plan: Plan) -> None:
    """Make this process one that trains: folder, threads, deterministic kernels."""
    root = Path(plan.place.root)
    if root.is_dir():  # on another node the shipped working directory stands in for it
        os.chdir(root)
    pin(plan.workers.threads)
    if plan.recipe.training.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = plan.recipe.training.tf32


def among_nodes(seat: Seat, node_ids: Sequence[str]) -> Seat:
    """The seat with its numbers among nodes and within its own, in the order of the ranks.

    Ray counts by address, and takes two of its nodes on one machine for one.

    Args:
        node_ids: Ray's name of each rank's node.
    """
    node = list(dict.fromkeys(node_ids)).index(seat.node_id)
    return replace(seat, local_rank=node_ids[: seat.rank].count(seat.node_id), node=node)


def check_seat(plan: Plan, seat: Seat) -> None:
    """See that Ray gave this run as many workers as the plan counts on.

    Raises:
        Refused: there are more than the method allows.
        RunFailed: there are more or fewer than planned.
    """
    # A world of one has an initialised process group as well, so it is the size that tells.
    too_many = too_many_workers(plan.recipe.method, seat.world)
    if too_many is not None:
        most = plan.recipe.method.traits().max_workers
        raise Refused(f"{too_many}, but Ray started {seat.world}: write ray_num_workers: {most}.")
    workers = plan.workers
    if not workers.least <= seat.world <= workers.count:
        planned = f"{workers.least} to {workers.count}" if workers.elastic else str(workers.count)
        raise RunFailed(f"Ray started {seat.world} worker(s) where the plan has {planned}.")
