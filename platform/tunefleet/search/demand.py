"""What a search asks of a cluster that does not exist yet: pods for trials of every size that may be sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunefleet.errors import Refused
from tunefleet.launch.demand import (
    DEFAULT_REQUEST,
    NODE_TYPES,
    REQUEST,
    Demand,
    GroupDemand,
    inlined,
    planned_on_request,
    pods_for,
    refuse_empty_seats,
    request_reason,
)
from tunefleet.plan import WorkerPlan
from tunefleet.recipe.tune import KEY, SearchRecipe, search_from
from tunefleet.search.opening import open_space
from tunefleet.search.sizing import trial_keys, trial_recipe
from tunefleet.search.space import Branch
from tunefleet.search.tournament import planned_trials
from tunefleet_strategies.errors import StrategyError

MOST_AT_ONCE = 8
"""Trials at once where the recipe leaves their number to the size of the cluster, which is decided here."""


@dataclass(frozen=True)
class TrialSize:
    """Workers of a trial, and the branch that may sample it."""

    workers: WorkerPlan
    branch: str
    why_one: str | None
    """What limits the method to one worker; None where nothing does."""


def search_demand(keys: dict[str, object], root: Path, workers_per_pod: int | None = None) -> Demand:
    """What a recipe with a `tune:` block asks for.

    Raises:
        Refused: the search, or a whole branch of it, cannot run anywhere.
    """
    written = inlined(keys, root)
    request = written.get(REQUEST) or dict(DEFAULT_REQUEST)
    search = search_from({**written, REQUEST: request})
    space = open_space(search)
    trials = planned_trials(space, search.tune)
    at_once, why_at_once = _at_once(search, trials)
    sizes = [size for branch in space.branches for size in _sizes(branch, search)]
    refuse_empty_seats(workers_per_pod, max(size.workers.count for size in sizes))
    common = space.common_recipe()
    groups = tuple(_groups(sizes, at_once, workers_per_pod, request_reason(written)))
    block = written[KEY]
    assert isinstance(block, Mapping)  # or it would not have been read
    return Demand(
        command="tune",
        run_name=common.run_name,
        keys={
            **written,
            REQUEST: request,
            NODE_TYPES: {group.name: group.node_type() for group in groups},
            KEY: {**block, "max_concurrent_trials": at_once},
        },
        groups=groups,
        drivers=at_once,
        grows=True,
        why=(
            f"trials at once {at_once}: {why_at_once}",
            f"trial_driver {at_once} on the head: one seat for the driver of each trial; drivers take no CPU, and the "
            "head's pod is not one that is taken away",
            f"{NODE_TYPES} in the recipe: what these groups may grow to, which Ray's autoscaler tells nobody",
        ),
    )


def _at_once(search: SearchRecipe, trials: int) -> tuple[int, str]:
    written = search.tune.max_concurrent_trials
    if written == "auto":
        most = min(trials, MOST_AT_ONCE)
        return most, (
            f"tune.max_concurrent_trials is auto and the search has at most {trials} trial(s); more than "
            f"{MOST_AT_ONCE} only if the recipe says so"
        )
    if written > trials:
        return trials, f"the search has at most {trials} trial(s), fewer than tune.max_concurrent_trials: {written}"
    return written, f"tune.max_concurrent_trials: {written}"


def _sizes(branch: Branch, search: SearchRecipe) -> Iterable[TrialSize]:
    """The different sizes that trials of a branch may have."""
    refusal: Exception | None = None
    found: dict[tuple[object, ...], TrialSize] = {}
    for values in branch.legal_outlines():
        try:
            recipe = trial_recipe(trial_keys(branch, values, search.keys), "outline", "outline")
            workers = planned_on_request(recipe, grows=True)
        except (Refused, StrategyError) as error:
            refusal = refusal or error
            continue
        limited = recipe.method.traits().max_workers == 1
        key = (workers.count, tuple(sorted(workers.resources.items())), workers.placement_strategy, limited)
        why = f"{recipe.method.label()} runs on one worker" if limited else None
        found.setdefault(key, TrialSize(workers, branch.name, why))
    if not found:
        raise Refused(f"tune.space, {branch.name}: can never run: {refusal}")
    return found.values()


def _groups(sizes: list[TrialSize], at_once: int, wished: int | None, reason: str) -> Iterable[GroupDemand]:
    """A group for each request: one for trials of several workers, one with a worker on a pod for those of one."""
    by_request: dict[tuple[tuple[str, float], ...], list[TrialSize]] = {}
    for size in sizes:
        by_request.setdefault(tuple(sorted(size.workers.resources.items())), []).append(size)
    taken: list[str] = []
    for alike in by_request.values():
        several = [size for size in alike if size.workers.count > 1]
        single = [size for size in alike if size.workers.count == 1]
        device = "gpu" if alike[0].workers.device == "cuda" else "cpu"
        for name, own in ((f"{device}-workers", several), (f"{device}-single", single)):
            if own:
                unique = name if name not in taken else f"{name}-{sum(one.startswith(name) for one in taken) + 1}"
                taken.append(unique)
                yield _group(unique, own, at_once, wished if own is several else None, reason)


def _group(name: str, sizes: list[TrialSize], at_once: int, wished: int | None, reason: str) -> GroupDemand:
    largest = max(sizes, key=lambda size: size.workers.count)
    per_pod, why_per_pod = pods_for(largest.workers, wished)
    count = largest.workers.count
    most = at_once * math.ceil(count / per_pod) if count > 1 else math.ceil(at_once / per_pod)
    branches = ", ".join(dict.fromkeys(size.branch for size in sizes))
    one = next((size.why_one for size in sizes if size.why_one is not None), None)
    why = [f"maxReplicas {most}: {at_once} trial(s) at once of {count} worker(s) ({branches}), {why_per_pod}"]
    if one is not None:
        why.append(f"a group of its own for trials of one worker: {one}")
    return GroupDemand(name, largest.workers.resources, per_pod, 0, most, (*why, reason), single=count == 1)
