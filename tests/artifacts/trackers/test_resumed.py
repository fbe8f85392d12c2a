"""A run that was killed and resumed is one run at its tracker, with each step once: real kills, real trackers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tests.artifacts.trackers.offline_files import config, rows
from tests.artifacts.trackers.recorded import CONFIG, UPDATES

from tunefleet.artifacts.metrics import METRICS, TIMING_FIELDS, read_metrics

ROOT = Path(__file__).resolve().parents[3]
KEY = "4" * 40
KILLS = [
    (11, "arrived"),
    *(pytest.param(kill, marks=pytest.mark.slow) for kill in [(13, "on the way"), (3, "arrived"), (0, "")]),
]
"""Behind which update the first process dies (0: it does not), and whether all lines had arrived by then."""


def attempt(folder: Path, trackers: str, dies_at: int, arrived: str, store: str | None = None) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "platform", "strategies"))
    environment = os.environ | {
        "PYTHONPATH": path,
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": KEY,
        "MLFLOW_ALLOW_FILE_STORE": "true",
        **({"MLFLOW_TRACKING_URI": store} if store else {}),
    }
    module = "tests.artifacts.trackers.recorded"
    command = [sys.executable, "-m", module, str(folder / "record"), trackers, str(dies_at), arrived]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == (-9 if dies_at else 0), done.stderr


def truth(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """The curves as the record has them, without what the clock says."""
    curves: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for line in read_metrics(folder / "record" / METRICS):
        family = "eval" if "eval_loss" in line else "train"
        for key, value in line.items():
            if key not in TIMING_FIELDS | {"step"} and (family, key) != ("eval", "epoch"):
                curves[f"{family}/{key.removeprefix('eval_')}"].append((line["step"], value))
    return curves


def assert_same(shown: dict[str, list[tuple[int, Any]]], folder: Path) -> None:
    """Each step once, and the record's values. Of what the clock says, each step once."""
    expected = truth(folder)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, UPDATES + 1))
    assert {curve: shown[curve] for curve in expected} == expected
    for rank in (0, 1):
        assert [step for step, _ in shown[f"workers/step_seconds/rank_{rank}"]] == list(range(1, UPDATES + 1))
    assert [step for step, _ in shown["train/tokens_per_second"]] == list(range(1, UPDATES + 1))


def killed_and_resumed(
    folder: Path, trackers: tuple[str, ...], kill: tuple[int, str], store: str | None = None
) -> dict[str, str]:
    """Make one or two attempts; returns the run's name at each tracker."""
    attempt(folder, ",".join(trackers), *kill, store)
    before = names_at(folder, trackers)
    if kill[0]:
        attempt(folder, ",".join(trackers), 0, "", store)
    after = names_at(folder, trackers)
    assert after.keys() == set(trackers)
    assert before.items() <= after.items(), "a resumed run is the same run there"
    leaks = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert leaks == []
    return after


def names_at(folder: Path, trackers: tuple[str, ...]) -> dict[str, str]:
    files = {tracker: folder / "record" / f"{tracker}.json" for tracker in trackers}
    return {tracker: json.loads(file.read_text())["run_id"] for tracker, file in files.items() if file.exists()}


def at_mlflow(store: str, run_id: str) -> dict[str, list[tuple[int, Any]]]:
    """What MLflow has of a run; there is one run, it is finished and has the configuration."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("tunefleet")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.params["learning_rate"] == str(CONFIG["learning_rate"])
    assert run.data.params["plan.batch.global_batch_samples"] == "16"
    return {
        curve: [(point.step, point.value) for point in client.get_metric_history(run_id, curve)]
        for curve in run.data.metrics
    }


def at_wandb(folder: Path, run_id: str) -> dict[str, list[tuple[int, Any]]]:
    """What W&B's client has of a run, in one file for all of it, with the configuration."""
    (file,) = (folder / "record" / "wandb").glob(f"offline-run-*-{run_id}/*.wandb")
    shown: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for row in rows(file):
        for curve, value in row.items():
            if not curve.endswith("/step"):
                shown[curve].append((row["eval/step" if curve.startswith("eval/") else "train/step"], value))
    assert config(file)["plan"] == CONFIG["plan"]
    assert config(file)["lora_target"] == CONFIG["lora_target"]
    return shown


@pytest.mark.parametrize("kill", KILLS)
def test_trackers_have_each_step_once(tmp_path: Path, kill: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "mlruns").as_uri()
    names = killed_and_resumed(tmp_path, ("mlflow", "wandb"), kill, store)
    assert_same(at_mlflow(store, names["mlflow"]), tmp_path)
    assert_same(at_wandb(tmp_path, names["wandb"]), tmp_path)


@pytest.mark.slow
def test_without_a_server_mlflow_keeps_a_database_beside_the_runs(tmp_path: Path) -> None:
    names = killed_and_resumed(tmp_path, ("mlflow",), (11, "arrived"))
    assert_same(at_mlflow(f"sqlite:///{tmp_path}/mlflow.db", names["mlflow"]), tmp_path)
