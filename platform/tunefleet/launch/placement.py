"""From a plan to what Ray reserves for it."""

from __future__ import annotations

from ray.train import FailureConfig, RunConfig, ScalingConfig

from tunefleet.plan import Plan
from tunefleet.storage import Place
from tunefleet.stores import for_ray


def scaling(plan: Plan) -> ScalingConfig:
    """One bundle for each worker, of the planned size."""
    workers = plan.workers
    return ScalingConfig(
        num_workers=workers.count,
        use_gpu=workers.device == "cuda",
        resources_per_worker=dict(workers.resources),
        placement_strategy=workers.placement_strategy,
    )


def run_config(plan: Plan, storage: Place) -> RunConfig:
    """Ray keeps its own books in the run's folder; checkpoints are found again by ours (see `launch/runs.py`)."""
    return RunConfig(
        name=plan.place.run_name,
        storage_path=storage.path,
        storage_filesystem=for_ray(storage.filesystem),
        failure_config=FailureConfig(max_failures=plan.recipe.ray.max_failures),
    )
