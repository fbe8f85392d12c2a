"""The trackers that a recipe asks for, told what this run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunefleet.artifacts.record import without_secrets
from tunefleet.artifacts.trackers.mlflow_run import MlflowRun
from tunefleet.artifacts.trackers.tracker import TrackedRun, Tracker, refuse_missing
from tunefleet.artifacts.trackers.wandb_run import WandbRun
from tunefleet.worker.job import Job


def trackers(job: Job, folder: Path) -> list[Tracker]:
    """The run's trackers, not yet opened.

    Args:
        folder: the record's folder on this machine.

    Raises:
        Refused: a package is missing here, or a tracker has nowhere to go.
    """
    plan = job.plan
    report_to = plan.recipe.run.report_to
    refuse_missing(report_to)
    numbers: dict[str, Any] = json.loads(plan.model_dump_json(exclude={"recipe", "notices"}))
    config: Any = without_secrets(plan.recipe.flat() | {"plan": numbers})
    run = TrackedRun(plan.place.run_name, config, job.folder.record, folder)
    local = job.folder.root.local_path
    made: dict[str, Tracker] = {}
    if "mlflow" in report_to:
        made["mlflow"] = MlflowRun(run, None if local is None else local.parent)
    if "wandb" in report_to:
        made["wandb"] = WandbRun(run)
    return list(made.values())
