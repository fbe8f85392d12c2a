"""Checkpoints on their way to storage: written aside at an update boundary, brought there while training goes on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tunefleet.artifacts.claim import Claim
from tunefleet.artifacts.folder import RunFolder
from tunefleet.checkpoints import prune, step_name
from tunefleet.hardware import on_network
from tunefleet.storage import Place
from tunefleet.training.checkpoint import save
from tunefleet.training.progress import Progress
from tunefleet.worker.build import Trainee
from tunefleet.worker.job import Job
from tunefleet.worker.reporter import Reporter
from tunefleet.worker.seat import Seat


@dataclass(frozen=True)
class _Upload:
    """A checkpoint under way."""

    step: int
    target: Place
    metrics: dict[str, Any]
    """What Ray is told with it."""
    work: Future[None]


class Saver:
    """The checkpoints of one attempt. At most one is under way: the next one waits for it.

    An error of the thread that brings it to storage comes up when the training looks (`failed`, then `settle`). As a
    context manager it lets the last one arrive, also when the training has failed.
    """

    def __init__(self, job: Job, seat: Seat, reporter: Reporter, claim: Claim) -> None:
        """Collective."""
        self._job = job
        self._seat = seat
        self._aside = seat.aside()
        self._reporter = reporter
        self._claim = claim
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: _Upload | None = None
        self._told: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)

    def save(self, trainee: Trainee) -> None:
        """Write the present step aside and send it on its way. Collective.

        Raises:
            Exception: what came of the checkpoint before, or of writing this one, on every rank.
        """
        self.settle()
        reporter = self._reporter
        folder = Path(tempfile.mkdtemp(prefix="tunefleet-", dir=_scratch(self._job.folder)))
        try:
            self._seat.together(lambda: self._write(folder, trainee))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        target = self._job.folder.checkpoints.child(step_name(reporter.step))
        best = reporter.best_step if self._job.plan.recipe.run.load_best_model_at_end else None
        work = self._thread.submit(self._bring, folder, target, None if best is None else step_name(best))
        self._upload = _Upload(reporter.step, target, {"step": reporter.step, **reporter.summary()}, work)

    @property
    def arrived(self) -> bool:
        """Whether a checkpoint has come through since the last `settle`, as far as this rank knows."""
        return self._upload is not None and self._upload.work.done()

    @property
    def failed(self) -> bool:
        """Whether one has not come through, as far as this rank knows."""
        return self._upload is not None and self._upload.work.done() and self._upload.work.exception() is not None

    def tell(self) -> None:
        """Tell the driver of a checkpoint that has arrived."""
        upload = self._upload
        if upload is not None and self.arrived and not self.failed and self._told != upload.step:
            self._told = upload.step
            self._reporter.saved(upload.step)

    def settle(self) -> None:
        """Wait for the checkpoint under way and tell Ray of it. Collective.

        Raises:
            Exception: what its way to storage came to, on every rank.
        """
        upload = self._upload
        if upload is None:
            return
        self._seat.together(upload.work.result)
        self.tell()
        self._upload = None
        self._reporter.hand_over(upload.target, upload.metrics)

    def _write(self, folder: Path, trainee: Trainee) -> None:
        part = folder / "part"
        part.mkdir()
        progress = Progress(self._reporter.step, self._reporter.state())
        save(part, trainee.state, progress, only_weights=not self._job.plan.resumable)
        self._reporter.copy(folder / "record")

    def _bring(self, folder: Path, target: Place, best: str | None) -> None:
        """Runs beside the training, on every rank."""
        try:
            store(target, folder / "part", self._aside, lambda: self._send_record(folder))
            self._aside.together(lambda: self._tidy(best) if self._aside.leads else None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _send_record(self, folder: Path) -> None:
        """Bring the record to storage before the checkpoint counts, or a kill between the two would lose its lines.

        Raises:
            Superseded: the run is another command's.
        """
        self._claim.check()
        record = folder / "record"
        if record.is_dir():
            self._job.folder.record.mirror(record)

    def _tidy(self, best: str | None) -> None:
        prune(self._job.folder.checkpoints, self._job.plan.recipe.run.save_total_limit, best)


def store(target: Place, part: Path, seat: Seat, before_seal: Callable[[], None] = lambda: None) -> None:
    """Make one folder of every rank's part: each brings its own files, rank 0 seals them. Collective.

    Args:
        before_seal: what rank 0 does when everything else is there; raises if nothing may be written any more.

    Raises:
        RunFailed: two ranks wrote a file of the same name.
        Exception: what `before_seal` or the file system raised, on every rank. Nothing that counts is left.
    """
    staging = target.sibling(seat.from_leader(lambda: target.staging().name))

    def seal() -> None:
        before_seal()
        target.seal(staging, parts)

    try:
        parts = seat.from_all(lambda: staging.fill(part))
        seat.together(lambda: seal() if seat.leads else None)
    except BaseException:
        if seat.leads:
            staging.discard()
        raise


def _scratch(run: RunFolder) -> Path | None:
    """Where checkpoints are written aside: beside the run, so that there is room; None = where temporary files go.

    A run that is kept on another machine, its disk mounted here or not, is no place to write aside to.
    """
    scratch = run.scratch.local_path
    if scratch is None or on_network(scratch):
        return None
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch
