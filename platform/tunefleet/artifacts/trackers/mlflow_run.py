"""A run at MLflow: on the server of MLFLOW_TRACKING_URI, else in a database of this machine's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tunefleet.artifacts.trackers.tracker import LOADING, End, TrackedRun
from tunefleet.errors import Refused

if TYPE_CHECKING:
    from mlflow import MlflowClient

_T = TypeVar("_T")
EXPERIMENT = "tunefleet"
_STATUS: Mapping[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_BATCH = 90
"""Entries of one request; MLflow takes at most 100 parameters."""
_VALUE_CHARACTERS = 6000
"""Of a parameter, what MLflow takes."""

_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""MLflow's own switches, set where the person has not: by default a request to a dead server takes several minutes."""


class MlflowRun:
    """One of our runs as a run of MLflow's."""

    name = "mlflow"

    def __init__(self, run: TrackedRun, storage: Path | None) -> None:
        """
        Args:
            storage: the folder of all runs, where the database is kept that is used without a server; None where
                that is on no file system of this machine's.

        Raises:
            Refused: there is neither a server nor such a folder.
        """
        server = os.environ.get("MLFLOW_TRACKING_URI")
        if server is None and storage is None:
            raise Refused(
                "report_to: mlflow finds no MLFLOW_TRACKING_URI in the worker's environment, and ray_storage_path is "
                "no folder that a database could be kept in: set the variable, for example under env_vars of "
                "ray_init_kwargs, or drop mlflow from report_to."
            )
        self._uri = server or f"sqlite:///{storage}/mlflow.db"
        self._run = run
        self._reached: dict[str, int] = {}
        self._run_id = ""
        self._client: MlflowClient | None = None

    def open(self) -> None:
        for switch, value in _PATIENCE.items():
            os.environ.setdefault(switch, value)
        with LOADING:
            from mlflow import MlflowClient

        client = self._client = MlflowClient(tracking_uri=self._uri)
        known = self._run.tracked_as(self.name)
        if known is None:
            started = client.create_run(_experiment(client), run_name=self._run.name)
            known = str(started.info.run_id)
            self._run.keep(self.name, known)
        self._run_id = known
        client.update_run(known, status="RUNNING")
        data = client.get_run(known).data
        self._log_parameters(client, known=data.params)
        self._reached = {
            curve: max(point.step for point in client.get_metric_history(self._run_id, curve)) for curve in data.metrics
        }

    def reached(self, curve: str) -> int:
        return self._reached.get(curve, -1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if self._client is None:
            raise AssertionError("written before it was opened")
        now = int(time.time() * 1000)
        for part in _batches(list(numbers.items())):
            metrics = [Metric(curve, float(number), now, step) for curve, number in part]
            self._client.log_batch(self._run_id, metrics=metrics)
            self._reached |= {curve: step for curve, _ in part}

    def close(self, end: End) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id, _STATUS[end])

    def _log_parameters(self, client: MlflowClient, known: Mapping[str, str]) -> None:
        """What is there stays, as parameters cannot be changed."""
        from mlflow.entities import Param

        missing = [(key, value) for key, value in flat(self._run.config) if key not in known]
        for part in _batches(missing):
            client.log_batch(self._run_id, params=[Param(key, value[:_VALUE_CHARACTERS]) for key, value in part])


def flat(values: Mapping[str, object], before: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as text, their keys joined by dots."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)


def _batches(entries: Sequence[tuple[str, _T]]) -> Iterator[Sequence[tuple[str, _T]]]:
    for first in range(0, len(entries), _BATCH):
        yield entries[first : first + _BATCH]


def _experiment(client: MlflowClient) -> str:
    """The experiment that MLFLOW_EXPERIMENT_NAME names, made if it is not there."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another run made it just now
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)
