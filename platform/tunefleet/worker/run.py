"""What a worker does, from taking a seat to the finished model: the table of contents of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tunefleet.artifacts.claim import Claim
from tunefleet.errors import RunFailed, Superseded, first_line
from tunefleet.plan import Plan
from tunefleet.worker.build import Trainee, build, open_data
from tunefleet.worker.events import Arrived
from tunefleet.worker.failures import Failure, describe_failure, failures, hopeless, notes_of, record_failure
from tunefleet.worker.finish import finish
from tunefleet.worker.job import Job
from tunefleet.worker.leaving import Leaving, Messages, Watch
from tunefleet.worker.reporter import Line, Reporter
from tunefleet.worker.saving import Saver
from tunefleet.worker.seat import Seat, check_seat
from tunefleet.worker.start import found_start

if TYPE_CHECKING:
    from tunefleet.worker.gauges import Gauges

Ending = dict[str, Any]
"""How an attempt ended: `stopped`, `moved` with the reason, `failed`; on rank 0 with the numbers of the run."""


class Surroundings(Protocol):
    """What a worker finds around it: Ray Train (`under_ray.py`), or the host of a warm trial (`search/warm/`)."""

    def take_seat(self, plan: Plan) -> Seat:
        """This process's place among the workers; the process is made ready to train. Collective."""

    def post(self, seat: Seat) -> Post:
        """The line between this worker and the driver."""

    def gauges(self, job: Job, seat: Seat) -> Gauges | None:
        """This worker's Ray metrics; None where somebody else shows them."""

    def listen(self) -> None:
        """Note SIGTERM from now on, so that the run can save and go on elsewhere."""


class Post(Line, Messages, Protocol):
    """Both ways of a worker's line: what it tells, and what reaches it."""


def run_worker(job: Job, around: Surroundings) -> Ending:
    """Make one attempt at a run, on one rank. Whoever started it starts the next attempt if this one raises."""
    seat = around.take_seat(job.plan)
    post = around.post(seat)
    post.send(Arrived())
    try:
        past = seat.from_leader(lambda: _past(job))
    except RunFailed as error:  # the storage, which no note can be left in either
        return {"failed": True, "why": str(error)}
    if hopeless(past):
        return {"failed": True}
    reporter = Reporter(job, seat, post, around.gauges(job, seat))
    try:
        if job.plan.resumable:
            around.listen()
        return attempt(job, seat, reporter, post)
    except Superseded as error:  # the record is another command's now
        return {"failed": True, "why": str(error)}
    except Exception as error:
        number = past[-1].attempt + 1 if past else 1
        failure = describe_failure(error, number, seat.rank, reporter.step)
        noted = _noted(failure, job)
        if failure.final and seat.world == 1:
            return {"failed": True} if noted else {"failed": True, "why": failure.message}
        raise


def _past(job: Job) -> list[Failure]:
    """What the attempts of this command died of.

    Raises:
        RunFailed: the record takes no note, so attempts that die of that would know nothing of each other for ever.
    """
    try:
        notes_of(job.folder.record, job.mark).try_out()
        return failures(job.folder.record, job.mark)
    except OSError as error:
        raise RunFailed(
            f"The run's folder {job.folder.root.uri} cannot be written to ({first_line(error)}): see to its rights and "
            f"its room; the same command goes on from the newest checkpoint."
        ) from error


def _noted(failure: Failure, job: Job) -> bool:
    """Keep a failure in the record, if that can still be written to."""
    try:
        record_failure(job.folder.record, job.mark, failure)
    except (OSError, RunFailed):  # what befell the run befalls its note as well: a full disk, a store out of reach
        return False
    return True


def attempt(job: Job, seat: Seat, reporter: Reporter, messages: Messages) -> Ending:
    """Train from the newest checkpoint to the end, or until something ends it early."""
    check_seat(job.plan, seat)
    claim = Claim(job.folder.claim, job.mark)
    seat.together(lambda: claim.take() if seat.leads else None)
    data = seat.together(lambda: open_data(job.plan))
    with found_start(job, seat) as start:
        trainee = build(job.plan, seat, data, start)
    with reporter.open(trainee, data, start), Saver(job, seat, reporter, claim) as saver:
        watch = Watch(
            messages, seat, saver, resumable=job.plan.resumable, longest_gap=job.plan.cadence.preemption_notices
        )
        leaving = train(job, trainee, reporter, saver, watch)
        if leaving is not None:
            moved = leaving.why if leaving.moves else None
            return {"stopped": not leaving.moves, "moved": moved, **reporter.summary()}
        prints = finish(job, seat, trainee, data, reporter, claim)
        return {"stopped": False, "moved": None, **reporter.summary(), "fingerprints": prints}


def train(job: Job, trainee: Trainee, reporter: Reporter, saver: Saver, watch: Watch) -> Leaving | None:
    """Take the steps that are left; evaluate and save when the plan says so. Returns what ended it early."""
    cadence, last = job.plan.cadence, trainee.batches.updates
    if cadence.evaluates_at_start and reporter.step == 0:
        reporter.evaluated(0.0, trainee.evaluate())
    for step in trainee.steps(watch.should_stop):
        reporter.stepped(step, trainee.engine.measurements)
        reporter.notice(*trainee.engine.messages())
        if is_due(step.step, cadence.evaluation) or (step.step == last and cadence.evaluates_at_end):
            reporter.evaluated(step.epoch, trainee.evaluate())
        leaving = watch.agreed() if step.stopped else watch.look(step.step)
        if leaving is None and step.step == job.until:
            leaving = Leaving(False, "this is as far as it should go for now")
        if is_due(step.step, cadence.saving) or (step.step == last and cadence.saving) or leaving is not None:
            saver.save(trainee)
        saver.tell()
        if leaving is not None and step.step < last:
            saver.settle()
            return leaving
    saver.settle()  # all are in storage before the model is made of them
    return None


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many updates happens after this one."""
    return every is not None and step % every == 0
