"""A fork that makes one attempt at a run: the worker function of every run, with a pipe where Ray Train would be."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from tunefleet.artifacts.folder import RunFolder
from tunefleet.plan import Plan
from tunefleet.storage import Place, place
from tunefleet.worker.events import Event
from tunefleet.worker.gauges import Gauges
from tunefleet.worker.job import Job
from tunefleet.worker.leaving import Wish
from tunefleet.worker.run import run_worker
from tunefleet.worker.seat import Seat, prepare
from tunefleet.worker.termination import note_sigterm, terminated

Word = tuple[Literal["event", "figures", "ending", "failed"], Any]
"""What a worker tells: an `Event`, figures for Ray's metrics, what `run_worker` returned, or what it died of."""


@dataclass(frozen=True)
class Order:
    """One attempt."""

    plan: str
    """A `Plan` as JSON."""
    run: str
    """Where the run's folder is: a path or a URI."""
    command: str
    mark: str
    shared: str
    """The folder of what trials on this node begin from alike (`worker/shared.py`)."""
    node_id: str
    """Ray's name of this node."""
    environment: Mapping[str, str]
    """The host's, which says among others which GPU is its own."""


def work(line: Connection, order: Order) -> None:
    """Make the attempt and tell how it ended."""
    take_environment(order.environment)
    plan, folder = Plan.model_validate_json(order.plan), RunFolder(place(order.run))
    job = Job(plan, folder, order.command, order.mark, Path(order.shared))
    try:
        line.send(("ending", run_worker(job, InFork(line, order.node_id))))
    except Exception as error:  # told, for the trial to begin the next attempt
        line.send(("failed", f"{type(error).__name__}: {error}"))


def take_environment(environment: Mapping[str, str]) -> None:
    """Put the host's environment in the place of the server's."""
    os.environ.clear()
    os.environ.update(environment)


class InFork:
    """What a worker finds around it in a fork (`worker.run.Surroundings`)."""

    def __init__(self, line: Connection, node_id: str) -> None:
        self._line, self._node_id = line, node_id

    def take_seat(self, plan: Plan) -> Seat:
        """The only one there is."""
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
        prepare(plan)
        return Seat(0, 1, torch.device(plan.workers.device), node_id=self._node_id)

    def post(self, seat: Seat) -> Pipe:
        """The way to the trial's driver."""
        return Pipe(self._line)

    def gauges(self, job: Job, seat: Seat) -> Gauges:
        """The host shows them: it is the one that Ray knows."""
        return Gauges(lambda figures: self._line.send(("figures", dict(figures))))

    def listen(self) -> None:
        """This is the main thread."""
        note_sigterm()


class Pipe:
    """The worker's end of the line (`worker.run.Post`)."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._wish: Wish | None = None
        threading.Thread(target=self._read, daemon=True, name="wishes").start()

    def _read(self) -> None:
        """Wait for wishes; whoever's driver has died ends at once, as Ray's workers do."""
        try:
            while True:
                self._wish = self._line.recv()
        except (EOFError, OSError):
            os._exit(1)

    def send(self, event: Event) -> None:
        self._line.send(("event", event))

    def wish(self) -> Wish | None:
        return self._wish

    def terminated(self) -> bool:
        return terminated()

    def preempted(self) -> bool:
        """Never: a node that is taken away takes the host along, and the trial is begun again from its checkpoint."""
        return False

    def hand_over(self, checkpoint: Place, metrics: dict[str, Any]) -> None:
        """Nobody keeps books of checkpoints here: the next attempt looks for the newest."""

    def flush(self) -> None:
        """What was sent has arrived."""
