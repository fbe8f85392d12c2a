"""Trials in forks, driven as a host drives them, without Ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.worker.alone import run_alone

from tunefleet.artifacts.metrics import TIMING_FIELDS, Line, read_metrics
from tunefleet.artifacts.record import read_attempts
from tunefleet.launch.cluster import local_shape
from tunefleet.launch.draft import draft
from tunefleet.plan import Plan
from tunefleet.recipe.read import read_flat
from tunefleet.search.book import RUNS
from tunefleet.search.driven import plan_place
from tunefleet.search.warm.forks import Fork, ForkServer, Stock, TrialOrder, fork
from tunefleet.storage import Place, place


@dataclass(frozen=True)
class Folder:
    """The folder of a search whose trials are started by hand."""

    root: Path
    model: Path
    data: Path

    @property
    def search(self) -> Place:
        return place(str(self.root / "search"))

    def plan(self, name: str, **keys: object) -> Plan:
        """The plan of a trial, put where its driver finds it."""
        recipe = read_flat(
            {
                "model_name_or_path": str(self.model),
                "dataset": "quickstart_train",
                "dataset_dir": str(self.data / "data"),
                "cache_dir": str(self.data / "cache"),
                "cutoff_len": 64,
                "output_dir": str(self.root / name),
                "ray_run_name": name,
                "ray_storage_path": self.search.child(RUNS).uri,
                "resources_per_worker": {"CPU": 1},
                "finetuning_type": "lora",
                "lora_dropout": 0.1,
                "per_device_train_batch_size": 4,
                "max_steps": 12,
                "save_steps": 4,
                "logging_steps": 2,
                "report_to": "none",
                "plot_loss": False,
                "bf16": False,
                "seed": 7,
                **keys,
            }
        )
        plan = draft(recipe, local_shape(recipe.ray), self.root)
        plan_place(self.search, name).write_text(plan.model_dump_json())
        return plan

    def stock(self) -> Stock:
        return [self.plan("stock").model_dump(mode="json")]

    def begin(self, name: str, server: ForkServer) -> Fork:
        """Fork the driver of a trial."""
        order = TrialOrder(name, self.search.uri, False, 2, server.address, "node", dict(os.environ))
        return fork(server.address, "trial", order)

    def record(self, name: str) -> Path:
        return self.root / "search" / RUNS / name / "record"

    def attempts(self, name: str) -> list[dict[str, Any]]:
        return read_attempts(self.record(name))

    def lines(self, name: str) -> list[Line]:
        return read_metrics(self.record(name) / "metrics.jsonl")

    def prints(self, name: str) -> dict[str, str]:
        """The hashes of a finished run's last state."""
        prints: dict[str, str] = json.loads((self.record(name) / "result.json").read_text())["fingerprints"]
        return prints

    def checkpoints(self, name: str) -> list[int]:
        """The steps of the checkpoints that are whole."""
        folder = self.record(name).with_name("checkpoints")
        return sorted(int(file.parent.name.removeprefix("step_")) for file in folder.glob("step_*/complete.json"))

    def run_twin(self, plan: Plan) -> None:
        """The same run in this process, which nothing happens to."""
        ray = plan.recipe.ray.model_copy(update={"ray_run_name": f"{plan.place.run_name}_twin"})
        run_alone(plan.recipe.model_copy(update={"ray": ray}), self.root)


def exact_lines(record: Path) -> list[dict[str, Any]]:
    """The lines of a run that must be equal bit for bit in its twin."""
    lines = read_metrics(record / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def next_result(trial: Fork) -> dict[str, Any]:
    """Ask for a result as a host does."""
    trial.line.send("next")
    while True:
        kind, told = trial.line.recv()
        if kind != "progress":
            assert kind == "result", told
            return dict(told)


def run_through(trial: Fork) -> list[dict[str, Any]]:
    """All results of a trial."""
    results = [next_result(trial)]
    while not results[-1].get("done"):
        results.append(next_result(trial))
    return results


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Wait for a condition. Returns whether it came."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def forks_of(server: ForkServer) -> list[psutil.Process]:
    """The forks of a server that live."""
    return psutil.Process(server.pid).children()
