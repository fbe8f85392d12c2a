"""Checkpoints on their way to storage."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tunefleet.storage import Place, prune, step_name
from tunefleet.training.checkpoint import Progress, save
from tunefleet.worker.build import Trainee
from tunefleet.worker.job import Job
from tunefleet.worker.reporter import Reporter
from tunefleet.worker.seat import Seat


def save_checkpoint(job: Job, seat: Seat, trainee: Trainee, reporter: Reporter) -> None:
    """Save the present step: whole or not at all in storage, older ones thinned out, Ray told. Collective.

    Raises:
        Exception: what the file system raised, on every rank.
    """
    target = job.folder.checkpoints.child(step_name(reporter.step))
    with tempfile.TemporaryDirectory(prefix="tunefleet-", dir=_scratch(job)) as folder:
        progress = Progress(reporter.step, reporter.state())
        save(Path(folder), trainee.state, progress, only_weights=not job.plan.resumable)
        seat.together(lambda: _store(Path(folder), target, job, reporter) if seat.leads else None)
    reporter.saved(target)


def _scratch(job: Job) -> Path | None:
    """A folder on the disk that the checkpoint goes to, where that is one of this machine's."""
    scratch = job.folder.scratch.local_path
    if scratch is None:
        return None
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def _store(folder: Path, target: Place, job: Job, reporter: Reporter) -> None:
    target.upload(folder)
    run = job.plan.recipe.run
    best = reporter.best_step if run.load_best_model_at_end else None
    prune(job.folder.checkpoints, run.save_total_limit, None if best is None else step_name(best))
