"""Searches under Ray that something happens to, and what their books say afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import ray
from ray.util import placement_group_table
from tests.worker.under_ray import World

from tunefleet.artifacts.record import read_attempts
from tunefleet.launch.draft import Stages
from tunefleet.recipe.tune import SearchRecipe, search_from
from tunefleet.search.board import Progress
from tunefleet.search.book import Book
from tunefleet.search.trials import BranchPlan

LORA: dict[str, Any] = {"finetuning_type": "lora", "lora_rank": {"choice": [2, 4, 8, 16]}}
RATIO: dict[str, Any] = {
    "finetuning_type": "full",
    "use_badam": True,
    "badam_mode": "ratio",
    "badam_switch_interval": {"choice": [3, 4, 5, 6]},
}


_TRIALS = ("ray::RunTrial", "ray::HostTrial", "ray::ResourceTrainable")
"""What Ray calls the processes of trials: our classes between results, at work the one that Tune makes of them."""


def kill_trials() -> int:
    """Kill the processes of trials that this process's own Ray has started: drivers or hosts. Returns their number."""
    killed = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one of Ray's short ones
            if process.name().startswith(_TRIALS):
                process.kill()
                killed += 1
    return killed


class Watching:
    """A display that hands the book to a function, twice a second."""

    def __init__(self, react: Callable[[Book], None] | None = None) -> None:
        self.notes: list[str] = []
        self.plans: Sequence[BranchPlan] = ()
        self.at_once = 0
        self._react = react

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @contextmanager
    def preparing(self) -> Iterator[Stages]:
        yield lambda *_: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show_plan(self, plans: Sequence[BranchPlan], book: Book, trials: int, at_once: int) -> None:
        self.plans, self.at_once = plans, at_once

    def update(self, book: Book, progress: Mapping[str, Progress]) -> None:
        if self._react is not None:
            self._react(book)


def search_keys(world: World, space: Any, *, tune: Mapping[str, Any] | None = None, **more: object) -> dict[str, Any]:
    """A search of short trials, which evaluate every 10 of 40 steps."""
    keys = world.keys("search", "full", 2, max_steps=40, save_steps=20, logging_steps=10)
    shared: dict[str, object] = {
        "finetuning_type": None,
        "eval_dataset": "quickstart_heldout",
        "eval_strategy": "steps",
        "eval_steps": 10,
        "max_samples": 64,
        "bf16": False,
    }
    return {**keys, **shared, **more, "tune": {"search": "grid", **(tune or {}), "space": space}}


def searched(world: World, space: Any, *, tune: Mapping[str, Any] | None = None, **more: object) -> SearchRecipe:
    return search_from(search_keys(world, space, tune=tune, **more))


def folder(world: World) -> Path:
    return world.folder / "runs" / "search"


def kept(world: World) -> list[dict[str, Any]]:
    """The trials of the book on disk."""
    trials: list[dict[str, Any]] = json.loads((folder(world) / "trials.json").read_text())["trials"]
    return trials


def attempts(world: World, trial: str) -> list[dict[str, Any]]:
    return read_attempts(folder(world) / "trials" / trial / "record")


def worker_groups() -> list[list[dict[str, float]]]:
    """The bundles of each placement group that is there for workers, as Ray's own table has them."""
    groups = (group for group in placement_group_table().values() if group["state"] in ("CREATED", "PENDING"))
    bundles = (list(group["bundles"].values()) for group in groups)
    return [held for held in bundles if any("CPU" in bundle for bundle in held)]


def all_given_back(world: World) -> bool:
    """Whether Ray, asked after a search, has no placement group for workers any more."""
    ray.init(address=world.address, log_to_driver=False)
    try:
        return until(lambda: not worker_groups(), 10)
    finally:
        ray.shutdown()


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition. Returns whether it came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return condition()
