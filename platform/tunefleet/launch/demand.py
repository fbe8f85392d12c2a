"""What a recipe asks of a cluster that does not exist yet: groups of alike pods, and why there are so many of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.plan import WorkerPlan
from tunefleet.planning import planned_precision, planned_workers
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import Recipe
from tunefleet.shapes import SINGLE_WORKER, ClusterShape, NodeShape
from tunefleet.training import deepspeed_config

Keys = Mapping[str, object]

DEFAULT_REQUEST: Mapping[str, float] = {"GPU": 1.0, "CPU": 1.0}
"""What a worker has where no recipe says it, as in any cluster with GPUs."""
REQUEST = "resources_per_worker"
NODE_TYPES = "ray_node_types"


@dataclass(frozen=True)
class GroupDemand:
    """Alike pods. A pod holds whole workers."""

    name: str
    request: Mapping[str, float]
    """Of one worker, by Ray's names."""
    workers_per_pod: int
    least_pods: int
    most_pods: int
    why: tuple[str, ...]
    """One sentence for each number."""
    single: bool = False
    """Whether it is for trials of one worker, beside a group for larger ones."""

    @property
    def gpus(self) -> int:
        """GPUs of a pod: whole ones."""
        return math.ceil(self.request.get("GPU", 0.0) * self.workers_per_pod)

    @property
    def cpus(self) -> int:
        """CPUs of a pod that Ray gives to workers: whole ones."""
        return math.ceil(self.request.get("CPU", 0.0) * self.workers_per_pod)

    @property
    def others(self) -> dict[str, float]:
        """What a pod offers beside GPUs, CPUs and memory, by Ray's names."""
        return {
            name: amount * self.workers_per_pod
            for name, amount in self.request.items()
            if name not in ("CPU", "GPU", "memory") and amount > 0
        }

    @property
    def labels(self) -> dict[str, str]:
        """Ray's labels of a pod."""
        return {SINGLE_WORKER: "true"} if self.single else {}

    def node_type(self) -> dict[str, object]:
        """The group as an entry of `ray_node_types`."""
        offered = {"CPU": float(self.cpus), "GPU": float(self.gpus), **self.others}
        kind: dict[str, object] = {
            "resources": {name: amount for name, amount in offered.items() if amount > 0},
            "max_workers": self.most_pods,
        }
        return {**kind, "labels": self.labels} if self.labels else kind


@dataclass(frozen=True)
class Demand:
    """What a job asks for."""

    command: Literal["train", "tune"]
    run_name: str
    keys: Keys
    """The recipe as it travels: what was planned is written in it."""
    groups: tuple[GroupDemand, ...]
    drivers: int
    """Drivers of trials at the same time; 0 for a single run, whose driver is the job itself."""
    grows: bool
    """Whether pods come and go with what the search asks for."""
    why: tuple[str, ...]


def train_demand(keys: Keys, root: Path, workers_per_pod: int | None = None) -> Demand:
    """What a training run asks for.

    Args:
        root: the folder that a path of a DeepSpeed file starts from; its content travels with the recipe.

    Raises:
        Refused: the recipe cannot run anywhere.
    """
    written = inlined(keys, root)
    recipe = read_flat(written)
    workers = planned_on_request(recipe)
    per_pod, why_per_pod = pods_for(workers, workers_per_pod)
    refuse_empty_seats(workers_per_pod, workers.count)
    least, most = math.ceil(workers.least / per_pod), math.ceil(workers.count / per_pod)
    asked = f"ray_num_workers: {workers.count}"
    if workers.elastic:
        asked = f"ray_num_workers: [{workers.least}, {workers.count}]"
    why = [f"replicas {most}: {asked}, {why_per_pod}"]
    if workers.elastic:
        why.append(f"minReplicas {least}: the run starts with {workers.least} worker(s) and goes on to more")
    else:
        why.append(f"minReplicas and maxReplicas {most}: the run needs all of its workers at once, so nothing grows")
    device = "gpu" if workers.device == "cuda" else "cpu"
    group = GroupDemand(f"{device}-workers", workers.resources, per_pod, least, most, (*why, request_reason(written)))
    return Demand(
        command="train",
        run_name=recipe.run_name,
        keys={**written, REQUEST: dict(workers.resources)},
        groups=(group,),
        drivers=0,
        grows=False,
        why=("driver on the head: it trains nothing, asks for no CPU, and its pod is not one that is taken away",),
    )


def inlined(keys: Keys, root: Path) -> dict[str, object]:
    """The keys with the content of a DeepSpeed file in its path's place.

    Raises:
        Refused: there is no such file, or it holds no JSON.
    """
    written = keys.get("deepspeed")
    if not isinstance(written, str) or written in deepspeed_config.NAMED:
        return dict(keys)
    return {**keys, "deepspeed": deepspeed_config.read(written, root)}


def planned_on_request(recipe: Recipe, *, grows: bool = False) -> WorkerPlan:
    """The workers of a recipe on a cluster that has just what they ask for.

    Args:
        grows: whether the nodes are still to come when the run is planned there, so that no GPU can be asked then.

    Raises:
        Refused: as `make_plan`.
    """
    request = recipe.ray.resources_per_worker or DEFAULT_REQUEST
    node = NodeShape(
        cpus=request.get("CPU", 0.0),
        gpus=request.get("GPU", 0.0),
        others={name: amount for name, amount in request.items() if name not in ("CPU", "GPU")},
    )
    gpu = Hardware("cuda", bf16=True) if node.gpus and not grows else None
    shape = ClusterShape((node,) * recipe.ray.max_workers, cpu=Hardware("cpu", bf16=True), gpu=gpu, may_grow=True)
    planned_precision(recipe, shape)
    return planned_workers(recipe, shape)


def pods_for(workers: WorkerPlan, wished: int | None) -> tuple[int, str]:
    """How many workers share a pod, and why.

    Raises:
        Refused: the wish and the recipe do not go together.
    """
    share = workers.resources.get("GPU", 0.0)
    if workers.placement_strategy == "STRICT_PACK":
        if wished not in (None, workers.count):
            raise Refused(
                f"placement_strategy: STRICT_PACK puts all of ray_num_workers: {workers.count} on one pod, but "
                f"--workers-per-pod is {wished}: leave the option out, or write placement_strategy: PACK."
            )
        return workers.count, "all on one pod (placement_strategy: STRICT_PACK)"
    if workers.placement_strategy == "STRICT_SPREAD" and wished not in (None, 1):
        raise Refused(
            f"placement_strategy: STRICT_SPREAD puts each worker on a pod of its own, but --workers-per-pod is "
            f"{wished}: leave the option out, or write placement_strategy: SPREAD."
        )
    if wished is not None:
        return wished, f"{wished} on a pod (--workers-per-pod)"
    if 0 < share < 1 and workers.placement_strategy != "STRICT_SPREAD":
        fits = int(1 / share + 1e-9)
        return fits, f"{fits} on a pod, which share its GPU ({share:g} each)"
    return 1, "one on a pod, which is scheduled most easily (--workers-per-pod for more)"


def refuse_empty_seats(wished: int | None, most: int) -> None:
    """See that no pod is wished for more workers than there are.

    Raises:
        Refused: it is.
    """
    if wished is not None and not 1 <= wished <= most:
        raise Refused(
            f"--workers-per-pod {wished} does not go with ray_num_workers, which is {most} at most: write {most} or "
            "less, or leave it out."
        )


def request_reason(keys: Keys) -> str:
    """Why a worker has what it has."""
    if keys.get(REQUEST):
        return f"resources of a pod: {REQUEST} as written, times its workers; one more CPU for Ray itself"
    return (
        f"resources of a pod: {REQUEST} is not written, so a worker has 1 GPU and 1 CPU; {REQUEST}: {{CPU: 4}} asks "
        "for machines without GPUs"
    )
