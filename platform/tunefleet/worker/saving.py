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
        store(target, Path(folder), seat)
    seat.together(lambda: _thin_out(job, reporter) if seat.leads else None)
    reporter.saved(target)


def store(target: Place, part: Path, seat: Seat) -> None:
    """Make one folder of every rank's part: each brings its own files, rank 0 seals them. Collective.

    Raises:
        RunFailed: two ranks wrote a file of the same name.
        Exception: what the file system raised, on every rank. Nothing that counts is left.
    """
    staging = target.sibling(seat.from_leader(lambda: target.staging().name))
    try:
        parts = seat.from_all(lambda: staging.fill(part))
        seat.together(lambda: target.seal(staging, parts) if seat.leads else None)
    except BaseException:
        if seat.leads:
            staging.discard()
        raise


def _scratch(job: Job) -> Path | None:
    """A folder on the disk that the checkpoint goes to, where that is one of this machine's."""
    scratch = job.folder.scratch.local_path
    if scratch is None:
        return None
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def _thin_out(job: Job, reporter: Reporter) -> None:
    run = job.plan.recipe.run
    best = reporter.best_step if run.load_best_model_at_end else None
    prune(job.folder.checkpoints, run.save_total_limit, None if best is None else step_name(best))
