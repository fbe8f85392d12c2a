"""Plans of trials: what each point of a search would run as, on this cluster."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunefleet.errors import Refused
from tunefleet.launch.draft import Stages, draft
from tunefleet.plan import Plan
from tunefleet.planning import refuse_too_large
from tunefleet.recipe.sections import Recipe
from tunefleet.recipe.tune import TuneSettings
from tunefleet.search.book import RUNS, Trial
from tunefleet.search.driven import plan_place
from tunefleet.search.hosts import host_of
from tunefleet.search.sizing import Size, shared_batch, size_of, trial_keys, trial_recipe
from tunefleet.search.space import WISH, Branch, Point, Space
from tunefleet.search.tournament import reseeded
from tunefleet.shapes import ClusterShape
from tunefleet.storage import Place
from tunefleet_strategies.errors import StrategyError

MOST_DRAFTED = 16
"""Points of a branch that are planned in full when the space is checked."""


@dataclass(frozen=True)
class BranchPlan:
    """What the trials of a branch will be."""

    branch: Branch
    workers: tuple[int, ...]
    """The numbers of workers that its points have, fewest first."""
    why: str | None
    """Why they are fewer than wished."""
    plan: Plan
    """Of one of its points."""
    host: str | None = None
    """`warm`, or why it is cold, where the search asks for warm trials."""


@dataclass(frozen=True)
class Workshop:
    """Makes plans of points."""

    space: Space
    tune: TuneSettings
    shared: Mapping[str, object] = field(repr=False)
    """The keys above `tune`."""
    cluster: ClusterShape
    root: Path
    search: Place
    """The search's folder."""

    def keys(self, point: Point) -> dict[str, object]:
        """The recipe of a point as a person would write it: workers and batch as they run, nothing else added."""
        branch = self.space.branches[point.branch]
        keys = trial_keys(branch, point.values, self.shared)
        return keys if point.seed is None else keys | reseeded(point.seed, branch.recipe(point.values))

    def plan(self, point: Point, stages: Stages | None = None, name: str | None = None) -> Plan:
        """The plan of a point.

        Raises:
            Refused, StrategyError: it cannot run on this cluster.
        """
        keys = self._sized(self.keys(point))
        recipe = trial_recipe(keys, name or f"trial_{point.digest}", self.search.child(RUNS).uri)
        return draft(recipe, self.cluster, self.root, stages)

    def _sized(self, keys: Mapping[str, object]) -> dict[str, object]:
        """The keys with the size of a worker, where none is written."""
        written = keys.get("resources_per_worker")
        size = self._worker(int(str(self.shared.get(WISH) or 1))) if written is None else written
        return {**keys, "resources_per_worker": size}

    def _worker(self, wish: int) -> dict[str, float]:
        """The size of a worker where none is written: a GPU, or the CPUs shared by the trials that are wanted at once.

        Where their number is free, each worker has one CPU: small models train faster side by side than one by one.
        """
        if self.cluster.gpus >= 1:
            return {"GPU": 1.0, "CPU": 1.0}
        at_once = self.tune.max_concurrent_trials
        if at_once == "auto":
            return {"CPU": 1.0}
        cpus = int(self.cluster.cpus) // (at_once * wish)
        while cpus > 1 and self.cluster.fits({"CPU": cpus}) < at_once * wish:
            cpus -= 1
        return {"CPU": float(max(1, cpus))}

    def put(self, trial: Trial, plan: Plan) -> None:
        """Write the plan of a trial to where its driver finds it."""
        ray = plan.recipe.ray.model_copy(update={"ray_run_name": trial.name})
        recipe = plan.recipe.model_copy(update={"ray": ray})
        named = plan.model_copy(
            update={"recipe": recipe, "place": plan.place.model_copy(update={"run_name": trial.name})}
        )
        plan_place(self.search, trial.name).write_text(named.model_dump_json())

    def survey(self, stages: Stages | None = None) -> list[BranchPlan]:
        """Plan a point of every branch.

        Raises:
            Refused: no point of a branch can run here.
        """
        return [self._survey(branch, stages) for branch in self.space.branches]

    def _survey(self, branch: Branch, stages: Stages | None) -> BranchPlan:
        refusal: Exception | None = None
        made: Plan | None = None
        counts: set[int] = set()
        why: str | None = None
        too_large: Refused | None = None
        for values in branch.legal_outlines():
            try:
                keys = self._sized(trial_keys(branch, values, self.shared))
                recipe = trial_recipe(keys, "outline", "outline")
                too_large = too_large or self._unheld(recipe)
                most = recipe.method.traits().max_workers
                wish = shared_batch(self.shared, recipe)[0]
                counts.add(recipe.ray.max_workers)
                if not branch.orders_workers and most is not None and most < wish:
                    why = f"{recipe.method.label()} runs on {most}"
            except (Refused, StrategyError) as error:
                refusal = refusal or error
        if too_large is not None:
            raise Refused(f"tune.space, {branch.name}: {too_large}")
        for values in itertools.islice(branch.legal_outlines(), MOST_DRAFTED):
            try:
                made = self.plan(branch.point(values), stages)
                break
            except (Refused, StrategyError) as error:
                refusal = refusal or error
        if made is None:
            raise Refused(f"tune.space, {branch.name}: can never run here: {refusal}")
        host = None if self.tune.trial_host == "cold" else host_of(made, tuple(counts))
        return BranchPlan(branch, tuple(sorted(counts)), why, made, host)

    def _unheld(self, recipe: Recipe) -> Refused | None:
        """Why no node type holds a trial, where the types are known: it would be asked for, and never come."""
        if not self.cluster.node_types:
            return None
        try:
            refuse_too_large(recipe, self.cluster)
        except Refused as error:
            return error
        return None


def smallest(plans: list[BranchPlan]) -> Size:
    """The size of the smallest trial that the space has, wherever it may be placed."""
    sizes = [replace(size_of(one.plan.workers, min(one.workers)), labels={}) for one in plans]
    return min(sizes, key=lambda size: size.workers * sum(size.request.values()))
