"""How many trials run side by side: as many as the cluster can hold when it has grown as far as it can."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from tunefleet.recipe.tune import TuneSettings
from tunefleet.search.sizing import Size, most_at_once
from tunefleet.shapes import TRIAL_DRIVER, ClusterShape

_WAITING = "TUNE_MAX_PENDING_TRIALS_PG"
"""How many trials may wait for their places at once. Ray's own number is one, which makes a cluster grow one node after
the other (ray #43451)."""


@dataclass(frozen=True)
class Breadth:
    """How many trials may be under way at the same time."""

    most: int
    """At most so many. As many may wait for their places at once: an autoscaler starts what is waited for."""
    limit: int | None
    """So many trials are enough, whatever there is room for; None = as many as find room."""
    cluster: ClusterShape | None
    """What they must find room in; None = nobody knows how large it may become."""
    notice: str | None = None


def breadth(
    settings: TuneSettings, size: Size, cluster: ClusterShape, trials: int, seats: int | None = None
) -> Breadth:
    """How many trials a search runs at once.

    Args:
        size: of its smallest trial.
        trials: in all.
        seats: for drivers; None = no end of them.
    """
    written = settings.max_concurrent_trials
    room = most_at_once(size, cluster, max(trials, 1))
    if room == 0 and not cluster.bounded:
        return _unknown(written)
    most = room if written == "auto" else min(room, written)
    limit = None if written == "auto" else written
    if seats is not None and seats < most:
        notice = (
            f"The cluster has {seats} seats for the drivers of trials ({TRIAL_DRIVER}), so {seats} trials run at once; "
            f"its nodes would hold {most}."
        )
        return Breadth(seats, seats, cluster, notice)
    return Breadth(most, limit, cluster)


def _unknown(written: int | str) -> Breadth:
    """Of a cluster that has no node for a trial yet, and does not say which ones it may start."""
    if isinstance(written, int):
        return Breadth(written, written, None)
    notice = (
        "The cluster has no node for a trial yet and does not say how far it grows, so trials run one by one: write "
        "ray_node_types, or tune.max_concurrent_trials: 4."
    )
    return Breadth(1, 1, None, notice)


def seats_for_drivers() -> int | None:
    """How many drivers of trials the cluster seats at once; None = no end of them: they sit on the head."""
    offered = ray.cluster_resources().get(TRIAL_DRIVER, 0.0)
    return int(offered) if offered >= 1 else None


@contextmanager
def all_may_wait(trials: int) -> Iterator[None]:
    """Let so many trials wait for their places at once, unless the person has said how many."""
    if _WAITING in os.environ:
        yield
        return
    os.environ[_WAITING] = str(trials)
    try:
        yield
    finally:
        del os.environ[_WAITING]
