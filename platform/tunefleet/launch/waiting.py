"""How long a run waits until the cluster has room for its workers, and what is said of it.

Ray itself waits for ever: it asks for the same places again and again, whether there will ever be such a node or not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray
from ray.util import placement_group_table

from tunefleet.errors import RunFailed
from tunefleet.plan import Plan
from tunefleet.worker.events import Arrived, Event, Lost, Noticed

_QUIET_SECONDS = 20.0
"""A wait that is worth a word; processes take some seconds to start on a cluster that is free."""


class Waiting:
    """The clock of a run that has no workers."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._limit_seconds = float(plan.recipe.ray.ray_start_timeout)
        self._since: float | None = time.monotonic()
        self._said = False

    def heard(self, events: Sequence[Event]) -> list[Event]:
        """Take in what the workers told. Returns it, with a word on the wait if there is one to say."""
        for event in events:
            if isinstance(event, Arrived):
                self._since = None
            elif isinstance(event, Lost):
                self._since, self._said = time.monotonic(), False
        waited = self._waited()
        if self._said or waited < min(_QUIET_SECONDS, self._limit_seconds / 2):
            return list(events)
        self._said = True
        situation = self._situation(self._has_places())
        return [*events, Noticed(f"{situation} The run waits for {self._limit_seconds:g} s in all.")]

    def look(self) -> None:
        """See how long it has been.

        Raises:
            RunFailed: too long.
        """
        if self._waited() < self._limit_seconds:
            return
        placed = self._has_places()
        mend = "add nodes, make resources_per_worker or ray_num_workers smaller, or wait longer"
        if placed:
            mend = "make it larger, or see Ray's logs for what holds the processes up"
        raise RunFailed(
            f"{self._situation(placed)} That has been so for ray_start_timeout: {self._limit_seconds:g} s: {mend}; "
            f"the same command tries again."
        )

    def _waited(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def _has_places(self) -> bool:
        """Whether Ray has set places aside for the workers, as far as this job's groups of that size tell."""
        job, workers = ray.get_runtime_context().get_job_id(), self._plan.workers
        one = {name: amount for name, amount in workers.resources.items() if amount > 0}
        return any(
            group["state"] == "CREATED"
            and number.endswith(job)
            and all(own == one for own in group["bundles"].values())
            for number, group in placement_group_table().items()
        )

    def _situation(self, placed: bool) -> str:
        """What is asked for, what is free, what there is."""
        workers = self._plan.workers
        one = ", ".join(f"{amount:g} {name}" for name, amount in workers.resources.items())
        if placed:  # so what is free says nothing
            return f"The workers have their places ({one} each), but their processes have not started yet."
        names = [name for name, amount in workers.resources.items() if amount > 0]
        free, nodes = ray.available_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
        have = {name: sum(node.get(name, 0.0) for node in nodes) for name in names}
        short = {name: workers.least * workers.resources[name] - free.get(name, 0.0) for name in names}
        missing = {name: amount for name, amount in short.items() if amount > 1e-6}
        if missing:
            lack = f"missing are {_amounts(missing)}"
        else:
            lack = "no node or nodes have it in the shape that is asked for, or their processes do not start"
        return (
            f"The cluster has no room for the workers: asked for are {workers.least} x ({one}), "
            f"{workers.placement_strategy}; free are {_amounts({name: free.get(name, 0.0) for name in names})}; "
            f"{len(nodes)} nodes have {_amounts(have)}; {lack}."
        )


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
