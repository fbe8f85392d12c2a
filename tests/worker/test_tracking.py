"""`report_to` in a whole run: what trackers are told, what they are not, and that nothing of theirs ends a run."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.artifacts.trackers.offline_files import config, rows
from tests.worker.alone import Finished, run_alone
from tests.worker.under_ray import Watching

from tunefleet.artifacts.trackers import tracker
from tunefleet.errors import Refused
from tunefleet.launch.train import train
from tunefleet.recipe.read import read_flat
from tunefleet.worker.events import Noticed

Run = Callable[..., Finished]
SECRET = "a-secret-that-nobody-may-read"


@pytest.fixture
def keys(job: dict[str, object]) -> dict[str, object]:
    return job | {"max_samples": 8, "max_steps": 4, "logging_steps": 2, "save_strategy": "no"}


def notices(finished: Finished, about: str) -> list[str]:
    told = finished.told.events
    return [event.text for event in told if isinstance(event, Noticed) and event.text.find(about) >= 0]


def leaks(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_wandb_is_told_recipe_plan_and_lines_but_no_secret(
    keys: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    variables = {"runtime_env": {"env_vars": {"MY_VARIABLE": SECRET}}}
    finished = run_alone(read_flat(keys | {"report_to": "wandb", "ray_init_kwargs": variables}), tmp_path)
    record = Path(finished.folder.record.uri)
    (file,) = (record / "wandb").glob("offline-run-*/*.wandb")
    assert [row["train/step"] for row in rows(file)] == [2, 4]
    told = config(file)
    assert told["learning_rate"] == json.loads((record / "record.json").read_text())["recipe"]["learning_rate"]
    assert told["plan"]["batch"]["global_batch_samples"] == 8
    assert notices(finished, "wandb") == []
    assert leaks(record) == []


def test_a_server_that_nobody_reaches_is_noticed_and_training_goes_on(
    keys: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@{address}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    finished = run_alone(read_flat(keys | {"report_to": "mlflow,tensorboard"}), tmp_path)
    assert finished.ending["step"] == 4
    down, missing = notices(finished, "mlflow")
    assert down.startswith("mlflow takes no lines")
    assert "training goes on" in down
    assert missing == "2 lines have not arrived at mlflow; metrics.jsonl holds all of them."
    assert SECRET not in down
    assert leaks(Path(finished.folder.root.uri)) == []


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(
    keys: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "PACKAGES", {"mlflow": ("a-package-that-is-not-there",)})
    recipe = read_flat(keys | {"report_to": ["tensorboard", "mlflow"]})
    with pytest.raises(Refused, match=r"pip install 'tunefleet\[mlflow\]', or drop it from report_to"):
        train(recipe, Watching(), tmp_path)
    assert not (tmp_path / "runs").exists()
