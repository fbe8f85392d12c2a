"""What a run tells while it goes on: its record on disk, and events to the driver. Rank 0 speaks, the others listen."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
import torch.distributed as dist

from tunefleet.artifacts.fingerprints import folder_fingerprint
from tunefleet.artifacts.record import RECORD, Recorder, has_line, write_record, write_result
from tunefleet.storage import Place
from tunefleet.training.step import Step
from tunefleet.worker.build import OpenedData, Trainee
from tunefleet.worker.events import Evaluated, Event, Logged, Noticed, Saved, Started, Stepped, Worker
from tunefleet.worker.job import Job
from tunefleet.worker.pacing import Figures, Pacing, columns
from tunefleet.worker.seat import Seat
from tunefleet.worker.start import Start
from tunefleet.worker.stragglers import StragglerWatch
from tunefleet.worker.tracking import trackers

if TYPE_CHECKING:
    from tunefleet.worker.gauges import Gauges


class Line(Protocol):
    """The way to the driver (`mailbox.Sender`)."""

    def send(self, event: Event) -> None:
        """Tell the driver, at some time soon."""

    def hand_over(self, checkpoint: Place, metrics: dict[str, Any]) -> None:
        """Tell Ray that a checkpoint is in storage. Collective."""

    def flush(self) -> None:
        """Wait until everything has arrived."""


class Reporter:
    """The voice of one attempt. On other ranks than 0 it only counts steps."""

    def __init__(self, job: Job, seat: Seat, sender: Line, gauges: Gauges | None = None) -> None:
        """
        Args:
            gauges: this worker's Ray metrics; None where there is no Ray.
        """
        self.step = 0
        """Updates applied so far."""
        self._job = job
        self._seat = seat
        self._sender = sender
        self._gauges = gauges
        self._recorder: Recorder | None = None
        self._pacing: Pacing | None = None
        self._stragglers = StragglerWatch(())
        self._updates = 0
        self._record = job.folder.record
        # A record on another machine is kept here and mirrored there at each checkpoint.
        self._scratch = None if self._record.local_path else tempfile.mkdtemp(prefix="tunefleet-")

    @property
    def folder(self) -> Path:
        """The record's folder on this machine."""
        return self._record.local_path or Path(str(self._scratch))

    def open(self, trainee: Trainee, data: OpenedData, start: Start) -> Self:
        """Begin to record at the step where the attempt begins. Collective."""
        self.step, self._updates = trainee.progress.step, trainee.batches.updates
        self._pacing = Pacing(trainee.engine, self._seat.device)
        self._stragglers = StragglerWatch(self._pacing.nodes)
        if self._seat.leads:
            if self._scratch is not None and self._record.exists():
                self._record.download(self.folder)
            run = self._job.plan.recipe.run
            self._recorder = Recorder(
                self.folder,
                self.step,
                logging_steps=run.logging_steps,
                updates=trainee.batches.updates,
                world_size=self._seat.world,
                state=trainee.progress.record if start.is_own and start.folder is not None else None,
                tensorboard=run.tensorboard,
                trackers=trackers(self._job, self.folder),
            )
            self._write_record(data)
            self.notice(*start.notices, *trainee.notices, *self._recorder.notices)
        workers = self._seat.from_all(lambda: _described(self._seat, data))
        self._sender.send(Started(self.step, trainee.batches.updates, self._seat.world, tuple(workers)))
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(kind, error, trace)
            self.notice(*self._recorder.complaints())
            self.publish()
            self._sender.flush()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def notice(self, *texts: str) -> None:
        """Tell the person something."""
        for text in texts:
            self._sender.send(Noticed(text))

    def stepped(self, step: Step, measure: Callable[[], Mapping[str, float]] = dict) -> None:
        """Take an update in; `measure` is called for the method's own figures of it, if it has a line. Collective."""
        self.step = step.step
        workers = self._workers(step)
        if self._gauges is not None:
            self._gauges.stepped(step)
            if workers:
                self._gauges.peak_memory(workers[self._seat.rank].memory_peak_bytes)
        line = None if self._recorder is None else self._recorder.step(step, measure, columns(workers))
        self._sender.send(Stepped(step))
        if self._recorder is not None:
            self.notice(*self._recorder.complaints())
        if line is not None:
            self._sender.send(Logged(line))
            self.notice(*self._stragglers.look([one.seconds_per_token for one in workers]))

    def _workers(self, step: Step) -> list[Figures]:
        """Every worker's figures since the line before, where this update has a line: else nothing is exchanged."""
        if self._pacing is None:
            return []
        self._pacing.add(step)
        due = has_line(step.step, self._job.plan.recipe.run.logging_steps, self._updates)
        return self._pacing.gather() if due else []

    def evaluated(self, epoch: float, loss: float) -> None:
        """Take an evaluation at the present step in."""
        if self._recorder is not None:
            self._recorder.evaluation(self.step, epoch, loss)
        if self._gauges is not None:
            self._gauges.evaluated(loss)
        self._sender.send(Evaluated(self.step, loss))

    def saved(self, step: int) -> None:
        """The checkpoint of a step is in storage."""
        self._sender.send(Saved(step))

    def hand_over(self, checkpoint: Place, metrics: dict[str, Any]) -> None:
        """Tell Ray of a checkpoint that is in storage. Collective."""
        self._sender.hand_over(checkpoint, metrics)

    def copy(self, folder: Path) -> None:
        """Copy the record as it stands, for storage, where it is not kept there already."""
        if self._recorder is not None and self._scratch is not None:
            shutil.copytree(self.folder, folder)

    def state(self) -> dict[str, int | float | None]:
        """What the checkpoint of the present step must carry of the record; empty on other ranks than 0."""
        return {} if self._recorder is None else self._recorder.state()

    @property
    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss; None on other ranks than 0."""
        return None if self._recorder is None else self._recorder.best_step

    def summary(self) -> dict[str, Any]:
        """The numbers of the run so far; empty on other ranks than 0."""
        return {} if self._recorder is None else dict(self._recorder.summary())

    def finish(self, fingerprints: dict[str, str]) -> None:
        """Say that the run is over. The last thing that is written."""
        if self._recorder is None:
            return
        self._recorder.close("finished")
        self.publish()
        write_result(self.folder, self._recorder.summary(), fingerprints)
        self.publish()

    def publish(self) -> None:
        """Bring the record to storage, where it is not kept there already."""
        if self._recorder is not None and self._scratch is not None:
            self._record.mirror(self.folder)

    def _write_record(self, data: OpenedData) -> None:
        """Once for each run: what it was made from."""
        if (self.folder / RECORD).exists():
            return
        plan = self._job.plan
        training, name = plan.recipe.training, plan.recipe.model.model_name_or_path
        base = Path(name).expanduser()
        write_record(
            self.folder,
            recipe=plan.recipe.flat(),
            plan=json.loads(plan.model_dump_json(exclude={"recipe"})),
            command=self._job.command,
            seeds={"seed": training.seed, "data": training.order_seed},
            hashes={
                "base": folder_fingerprint(base, "*.safetensors") if base.is_dir() else name,
                **{name: f"sha256:{digest}" for name, digest in data.prepared.files.items()},
            },
        )


def _described(seat: Seat, data: OpenedData) -> Worker:
    return Worker(
        seat.rank,
        int(os.environ.get("LOCAL_RANK", "0")),
        seat.node_id,
        seat.device.type,
        dist.get_backend() if dist.is_initialized() else "none",
        torch.get_num_threads(),
        data.prepared.built,
    )
