"""From a plan to what Ray reserves for it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, cast

from ray.train import FailureConfig, RunConfig, UserCallback
from ray.train.v2.api.config import ScalingConfig
from ray.tune import PlacementGroupFactory

from tunefleet.plan import Plan
from tunefleet.storage import Place
from tunefleet.stores import for_ray
from tunefleet.worker.events import Lost
from tunefleet.worker.exits import end_surely
from tunefleet.worker.mailbox import pack

NODE_ID = "ray.io/node-id"
"""Ray's own label of every node."""


def scaling(plan: Plan) -> ScalingConfig:
    """One bundle for each worker, of the planned size.

    Ray starts an elastic run on as many workers as there is room for, and goes on with fewer when it has lost some. It
    would start it again on more of them too, but only from the last checkpoint; the driver does that without losing a
    step (`launch/growth.py`), so Ray never looks.
    """
    workers = plan.workers
    return ScalingConfig(
        num_workers=(workers.least, workers.count) if workers.elastic else workers.count,
        elastic_resize_monitor_interval_s=math.inf,
        use_gpu=workers.device == "cuda",
        resources_per_worker=dict(workers.resources),
        placement_strategy=workers.placement_strategy,
        label_selector=dict(workers.labels) or None,
    )


def host_group(plan: Plan) -> PlacementGroupFactory:
    """The same bundles for a host of trials, which takes the first of them whole.

    Ray Tune's own reading of a `ScalingConfig` leaves the bundle to workers that are placed in it later.
    """
    request = scaling(plan).as_placement_group_factory()
    return PlacementGroupFactory(request.bundles, strategy=request.strategy, **host_labels(plan))


def host_labels(plan: Plan) -> dict[str, Any]:
    """The argument of a placement group that keeps a host to the nodes which its trials are kept to."""
    return {"bundle_label_selector": [dict(plan.workers.labels)]} if plan.workers.labels else {}


def away_from(nodes: Collection[str], plan: Plan) -> Plan:
    """The same plan with its workers kept off some nodes, by Ray's names."""
    if not nodes:
        return plan
    labels = {**plan.workers.labels, NODE_ID: f"!in({','.join(sorted(nodes))})"}
    return plan.model_copy(update={"workers": plan.workers.model_copy(update={"labels": labels})})


class TellsOfLoss(UserCallback):
    """Lives in Ray's controller and tells the driver when workers have failed."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Where it arrives is the controller's process."""
        vars(self).update(state)
        end_surely()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._mailbox.push.remote(pack([Lost()]))


def run_config(plan: Plan, storage: Place, mailbox: Any) -> RunConfig:
    """Ray keeps its own books in the run's folder; checkpoints are found again by ours (see `launch/runs.py`)."""
    return RunConfig(
        name=plan.place.run_name,
        storage_path=storage.path,
        storage_filesystem=for_ray(storage.filesystem),
        callbacks=[cast(Any, TellsOfLoss(mailbox))],  # Ray declares the older of its two kinds
        failure_config=FailureConfig(max_failures=plan.recipe.ray.max_failures),
    )
