"""Whole searches with warm hosts under Ray Tune: the same losses as ever, in the same places, and nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.search.under_tune import (
    LORA,
    RATIO,
    Watching,
    all_given_back,
    attempts,
    folder,
    kill_trials,
    searched,
    until,
    worker_groups,
)
from tests.worker.under_ray import World

from tunefleet.artifacts.metrics import TIMING_FIELDS, read_metrics
from tunefleet.plan import Plan
from tunefleet.search.book import Book
from tunefleet.search.tuner import SearchOutcome, tune

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

OWN_RAY: dict[str, Any] = {"ray_address": None, "ray_init_kwargs": {"num_cpus": 2}}


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, quickstart_world: Path, ray_address: str) -> World:
    return World(tmp_path, tiny_model, quickstart_world, ray_address)


def run_warm(
    world: World, space: Any, react: Callable[[Book], None] | None = None, **more: Any
) -> tuple[SearchOutcome, Watching]:
    display = Watching(react)
    settings = {"trial_host": "warm", **more.pop("tune", {})}
    keys = {"ray_num_workers": 1, **more}
    return tune(searched(world, space, tune=settings, **keys), display, world.folder), display


def exact(record: Path) -> list[dict[str, Any]]:
    """The lines of a run that must be equal bit for bit in its twin."""
    lines = read_metrics(record / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def train_cold(world: World, trial: str) -> Path:
    """The same run by `tunefleet train`, under Ray Train. Returns its record."""
    plan = Plan.model_validate_json((folder(world) / "plans" / f"{trial}.json").read_text())
    recipe = plan.recipe
    ray = recipe.ray.model_copy(update={"ray_run_name": f"{trial}_cold", "ray_address": world.address})
    run = recipe.run.model_copy(update={"output_dir": str(world.folder / f"{trial}_cold")})
    assert world.run(recipe.model_copy(update={"ray": ray, "run": run})).exit_code == 0
    return folder(world) / "trials" / f"{trial}_cold" / "record"


class Surveyor:
    """Notes the worker bundles that Ray has placed, and which trials run while there are some."""

    def __init__(self) -> None:
        self.groups: set[tuple[tuple[float, ...], ...]] = set()

    def __call__(self, book: Book) -> None:
        for group in worker_groups():
            self.groups.add(tuple(tuple(bundle.values()) for bundle in group))


def test_a_warm_search_computes_what_cold_runs_compute(world: World) -> None:
    """On a cluster that is there, where hosts start fork servers of their own."""
    surveyor = Surveyor()
    space = [
        {**LORA, "lora_rank": {"choice": [2, 4]}, "lora_dropout": 0.1},
        {**RATIO, "badam_switch_interval": {"choice": [5]}},
    ]
    outcome, display = run_warm(world, space, surveyor)
    assert outcome.exit_code == 0
    assert [one.host for one in display.plans] == ["warm", "warm"]
    trials = outcome.book.trials
    assert [trial.state for trial in trials] == ["finished"] * 3
    assert [[report["step"] for report in trial.reports] for trial in trials] == [[10, 20, 30, 40]] * 3
    assert surveyor.groups == {((1.0,),)}
    assert all_given_back(world)
    for trial in trials:
        record = folder(world) / "trials" / trial.name / "record"
        assert exact(record) == exact(train_cold(world, trial.name))
    assert any((world.folder / "search").glob("*.safetensors"))


def test_trials_of_several_workers_stay_cold_beside_warm_ones(world: World) -> None:
    space = [{**LORA, "lora_rank": {"choice": [4]}}, {**RATIO, "badam_switch_interval": {"choice": [5]}}]
    outcome, display = run_warm(world, space, ray_num_workers=2)
    assert [one.host for one in display.plans] == ["cold (2 workers)", "warm"]
    lora, ratio = outcome.book.trials
    assert (lora.state, ratio.state) == ("finished", "finished")
    assert [attempts(world, trial.name)[0]["world_size"] for trial in (lora, ratio)] == [2, 1]
    assert all_given_back(world)


def test_trials_that_asha_stops_leave_their_host_to_the_next(world: World) -> None:
    rates = {"finetuning_type": "full", "learning_rate": {"choice": [1e-2, 3e-5, 1e-5, 3e-6]}}
    outcome, _ = run_warm(world, [rates], tune={"scheduler": "asha", "max_concurrent_trials": 1})
    states = [trial.state for trial in outcome.book.trials]
    assert states[0] == "finished"
    assert states.count("stopped") >= 2
    for trial in outcome.book.trials:
        if trial.state == "stopped":
            assert attempts(world, trial.name)[-1]["executed_steps"] < 40
    assert all_given_back(world)


def test_trials_that_hyperband_pauses_go_on_in_another_host(world: World) -> None:
    rates = {"finetuning_type": "full", "learning_rate": {"loguniform": [1e-5, 1e-2]}}
    settings = {"search": "random", "scheduler": "hyperband", "num_samples": 4, "reduction_factor": 2}
    outcome, _ = run_warm(world, [rates], tune=settings)
    states = [trial.state for trial in outcome.book.trials]
    assert len(states) == 4
    assert set(states) <= {"finished", "stopped"}
    assert "finished" in states
    assert all_given_back(world)


class HostKiller:
    """Kills a host once, when its trial has a checkpoint behind it; notes every process of the search."""

    def __init__(self, step: int) -> None:
        self.killed = 0
        self.seen: set[psutil.Process] = set()
        self._before = set(psutil.Process().children(recursive=True))
        self._step = step

    def left(self) -> list[str]:
        """The processes of the search that are still there."""
        return [str(process) for process in self.seen if process.is_running()]

    def __call__(self, book: Book) -> None:
        self.seen |= set(psutil.Process().children(recursive=True)) - self._before
        if not self.killed and any(trial.steps >= self._step for trial in book.trials):
            self.killed = kill_trials()


def test_a_trial_whose_host_is_killed_is_begun_again_from_its_checkpoint(world: World) -> None:
    """On one CPU of this machine's own Ray: the next host can only sit there if the place of the first is free."""
    killer = HostKiller(step=300)
    steps = {"max_steps": 1500, "save_steps": 50, "eval_steps": 300}
    own = OWN_RAY | {"ray_init_kwargs": {"num_cpus": 1}}
    outcome, _ = run_warm(world, [{**LORA, "lora_rank": {"choice": [4]}}], killer, **own, **steps)
    assert killer.killed == 1
    (trial,) = outcome.book.trials
    assert trial.state == "finished"
    first, last = attempts(world, trial.name)
    assert first["reason"] == "killed"
    assert last["start_step"] >= 250
    assert last["executed_steps"] == 1500 - last["start_step"]
    assert until(lambda: not killer.left(), 30), killer.left()
