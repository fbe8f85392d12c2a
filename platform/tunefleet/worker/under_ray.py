"""What a worker of Ray Train finds around it."""

from __future__ import annotations

import os
from typing import Any

import ray
import ray.train
import ray.train.torch

from tunefleet.plan import Plan
from tunefleet.worker.gauges import Gauges, RayMetrics
from tunefleet.worker.job import Job
from tunefleet.worker.mailbox import Sender
from tunefleet.worker.pacing import node_name
from tunefleet.worker.seat import Seat, among_nodes, prepare
from tunefleet.worker.termination import note_sigterm


class UnderRay:
    """Ray Train's worker group (`run.Surroundings`)."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def take_seat(self, plan: Plan) -> Seat:
        """The seat that Ray gives this process."""
        context = ray.train.get_context()
        node_id = ray.get_runtime_context().get_node_id()
        alone = Seat(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device(), node_id=node_id)
        node_ids = alone.from_all(lambda: node_id)
        seat = among_nodes(alone, node_ids)
        os.environ |= {
            "LOCAL_RANK": str(seat.local_rank),
            "LOCAL_WORLD_SIZE": str(node_ids.count(node_id)),
            "NODE_RANK": str(seat.node),
        }
        prepare(plan)
        return seat

    def post(self, seat: Seat) -> Sender:
        """The way to the driver's mailbox."""
        return Sender(self._mailbox, active=seat.leads)

    def gauges(self, job: Job, seat: Seat) -> Gauges:
        """Of this rank."""
        return Gauges(RayMetrics(job.plan.place.run_name, seat.rank, node_name()).show)

    def listen(self) -> None:
        """Let the main thread note SIGTERM.

        The training runs in a thread. In the main thread Ray runs the worker's actor tasks, and has put a handler of
        its own that ends the process at once. So the worker sends itself a task that changes the handler, which then
        runs when Ray next asks the worker how it is.
        """
        actor: Any = ray.get_runtime_context().current_actor
        ray.get(actor.execute.remote(note_sigterm))
