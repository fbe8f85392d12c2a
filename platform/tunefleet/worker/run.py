"""What runs inside a Ray Train worker, from taking a seat to the finished model: the table of contents of a run."""

from __future__ import annotations

from typing import Any

from tunefleet.errors import RunFailed
from tunefleet.worker.build import Trainee, build, open_data
from tunefleet.worker.events import Arrived
from tunefleet.worker.failures import Failure, describe_failure, failures, hopeless, record_failure
from tunefleet.worker.finish import finish
from tunefleet.worker.job import Job, JobConfig, read_job
from tunefleet.worker.mailbox import Sender
from tunefleet.worker.reporter import Reporter
from tunefleet.worker.saving import save_checkpoint
from tunefleet.worker.seat import Seat, check_seat, take_seat
from tunefleet.worker.start import found_start

Ending = dict[str, Any]
"""How an attempt ended: `stopped` or `failed`, and on rank 0 the numbers of the run."""


def run_worker(config: JobConfig) -> Ending:
    """Make one attempt at a run, on one rank. Ray Train starts the next attempt if this one raises."""
    job = read_job(config)
    seat = take_seat(job.plan)
    sender = Sender(config["mailbox"], active=seat.leads)
    sender.send(Arrived())
    try:
        past = seat.from_leader(lambda: failures(job.folder.record))
    except RunFailed as error:  # the storage, which no note can be left in either
        return {"failed": True, "why": str(error)}
    if hopeless(past):
        return {"failed": True}
    reporter = Reporter(job, seat, sender)
    try:
        return attempt(job, seat, reporter)
    except Exception as error:
        number = past[-1].attempt + 1 if past else 1
        failure = describe_failure(error, number, seat.rank, reporter.step)
        noted = _noted(failure, job)
        if failure.final and seat.world == 1:
            return {"failed": True} if noted else {"failed": True, "why": failure.message}
        raise


def _noted(failure: Failure, job: Job) -> bool:
    """Keep a failure in the record, if that can still be written to."""
    try:
        record_failure(job.folder.record, failure)
    except (OSError, RunFailed):  # what befell the run befalls its note as well: a full disk, a store out of reach
        return False
    return True


def attempt(job: Job, seat: Seat, reporter: Reporter) -> Ending:
    """Train from the newest checkpoint to the end, or until the driver wants to stop."""
    check_seat(job.plan, seat)
    data = seat.together(lambda: open_data(job.plan))
    with found_start(job, seat) as start:
        trainee = build(job.plan, seat, data, start)
    with reporter.open(trainee, data, start):
        if not train(job, seat, trainee, reporter):
            return {"stopped": True, **reporter.summary()}
        prints = finish(job, seat, trainee, data, reporter)
        return {"stopped": False, **reporter.summary(), "fingerprints": prints}


def train(job: Job, seat: Seat, trainee: Trainee, reporter: Reporter) -> bool:
    """Take the steps that are left; evaluate and save when the plan says so. Returns False if stopped on the way."""
    cadence, last = job.plan.cadence, trainee.batches.updates
    if cadence.evaluates_at_start and reporter.step == 0:
        reporter.evaluated(0.0, trainee.evaluate())
    for step in trainee.steps(reporter.should_stop):
        reporter.stepped(step, trainee.engine.measurements)
        reporter.notice(*trainee.engine.messages())
        if is_due(step.step, cadence.evaluation) or (step.step == last and cadence.evaluates_at_end):
            reporter.evaluated(step.epoch, trainee.evaluate())
        if is_due(step.step, cadence.saving) or (step.step == last and cadence.saving) or step.stopped:
            save_checkpoint(job, seat, trainee, reporter)
        if step.stopped:
            return False
    return True


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many updates happens after this one."""
    return every is not None and step % every == 0
