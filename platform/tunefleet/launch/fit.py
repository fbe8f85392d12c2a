"""Ray Train's part of a run: it starts the workers, and starts them anew when they fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.train import WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.result import Result

from tunefleet.artifacts.folder import RunFolder
from tunefleet.errors import LONGEST_REASON, RunFailed, first_line
from tunefleet.launch.placement import run_config, scaling
from tunefleet.launch.verdict import ending_of, summary_of
from tunefleet.plan import Plan
from tunefleet.storage import Place
from tunefleet.worker.entry import run_under_ray
from tunefleet.worker.job import JobConfig

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_ELASTIC_START_SECONDS = "20"
"""Ray needs 16 s to see that a node is dead and waits for workers on it until then; after this it counts again."""


def start_fit(plan: Plan, storage: Place, config: JobConfig) -> Fit:
    """Start the workers of a run, and start them anew when they fail, until Ray gives up or they return."""
    fit = Fit(plan, _trainer(plan, storage, config))
    fit.start()
    return fit


def _trainer(plan: Plan, storage: Place, config: JobConfig) -> TorchTrainer:
    function: Any = run_under_ray  # Ray's types know no function that returns something
    return TorchTrainer(
        function,
        train_loop_config=dict(config),
        scaling_config=scaling(plan),
        run_config=run_config(plan, storage, config["mailbox"]),
        torch_config=TorchConfig(timeout_s=plan.recipe.ray.ddp_timeout),
    )


@contextmanager
def _patience(plan: Plan) -> Iterator[None]:
    """How long Ray waits for the places of its workers: of an elastic run not longer than for bad news of a node."""
    if not plan.workers.elastic or _START_TIMEOUT in os.environ:
        yield
        return
    os.environ[_START_TIMEOUT] = _ELASTIC_START_SECONDS  # Ray hands it to its controller
    try:
        yield
    finally:
        del os.environ[_START_TIMEOUT]


def in_a_line(error: WorkerGroupError) -> str:
    """What Ray says of workers that failed, without the page that it says it on."""
    ranks = "; ".join(
        f"rank {rank}: {first_line(failure, LONGEST_REASON)}" for rank, failure in sorted(error.worker_failures.items())
    )
    return f"{ranks}. Whoever leaves no word was killed, ran out of its node's memory, or its node is gone"


class Fit(threading.Thread):
    """`TorchTrainer.fit` off the main thread, which must stay free for signals."""

    def __init__(self, plan: Plan, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="fit")
        self._plan = plan
        self._trainer = trainer
        self._result: Result | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            with _patience(self._plan):
                result: Any = self._trainer.fit()  # Ray declares the older of its two results
            self._result = result
        except Exception as error:  # handed over to the main thread, which raises it
            self._error = error

    def ending(self) -> dict[str, Any] | None:
        """What rank 0 returned; None where it failed."""
        return ending_of(self._returned)

    def summary(self, folder: RunFolder, mark: str) -> dict[str, Any]:
        """What rank 0 returned.

        Raises:
            Refused, RunFailed: as `summary_of`.
        """
        error = self._error
        told = RunFailed(in_a_line(error)) if isinstance(error, WorkerGroupError) else error
        return summary_of(self._returned, told, folder, mark)

    @property
    def _returned(self) -> Any:
        return None if self._result is None else self._result.return_value
