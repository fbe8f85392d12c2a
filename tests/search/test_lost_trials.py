"""Trials that are lost, by a kill, for want of memory or with their node: the search goes on, and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors, list_placement_groups
from tests.cluster import RayNodes, ray_nodes
from tests.search.under_tune import LORA, Watching, attempts, folder, searched, until
from tests.worker.under_ray import World

from tunefleet.artifacts.metrics import read_metrics
from tunefleet.search.board import open_board
from tunefleet.search.book import Book, Trial
from tunefleet.search.tuner import SearchOutcome, tune

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

RANKS = {**LORA, "lora_rank": {"choice": [4, 8]}, "ray_num_workers": 1}
STEPS: dict[str, Any] = {"max_steps": 1500, "save_steps": 50, "eval_steps": 300}


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as started:
        yield started


def run(world: World, space: Any, react: Any = None, **more: Any) -> SearchOutcome:
    return tune(searched(world, space, **more), Watching(react), world.folder)


def checkpointed(world: World, trial: Trial) -> bool:
    """Whether a trial has something to go on from."""
    return any((folder(world) / "trials" / trial.name / "checkpoints").glob("step_*/complete.json"))


def assert_each_step_once(world: World, trial: Trial, steps: int) -> None:
    """Nothing of a trial was repeated after its checkpoint, nor lost."""
    *_, last = attempts(world, trial.name)
    assert (last["reason"], last["executed_steps"]) == ("finished", steps - last["start_step"])
    lines = read_metrics(folder(world) / "trials" / trial.name / "record" / "metrics.jsonl")
    logged = [line["step"] for line in lines if "loss" in line]
    assert logged == list(range(10, steps + 1, 10))


class WorkerKiller:
    """Kills the worker of the first trial whenever it has begun, and that of the second one once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.killed = {1: 0, 2: 0}

    def __call__(self, book: Book) -> None:
        trial = next((trial for trial in book.trials if trial.state == "running"), None)
        if trial is None or self.killed[trial.number] == {1: 2, 2: 1}[trial.number]:
            return
        begun = attempts(self._world, trial.name)
        trains = len(begun) > self.killed[trial.number] and begun[-1]["reason"] == "running"
        if not trains or not checkpointed(self._world, trial):
            return
        for process in psutil.Process().children(recursive=True):
            if process.pid == begun[-1]["pid"]:
                process.kill()
                self.killed[trial.number] += 1


def test_a_trial_that_fails_is_tried_again_then_recorded_with_its_error_and_the_search_goes_on(world: World) -> None:
    """Ray Train makes no second attempt here (max_failures: 0), so it is the search that does, once for each trial."""
    killer = WorkerKiller(world)
    own = {"ray_address": None, "ray_init_kwargs": {"num_cpus": 1}, "max_failures": 0}
    block = {"max_concurrent_trials": 1, "trial_retries": 1}
    outcome = run(world, [RANKS], killer, tune=block, **own, **STEPS)
    assert killer.killed == {1: 2, 2: 1}
    failed, fine = outcome.book.trials
    assert (failed.state, fine.state, outcome.exit_code) == ("failed", "finished", 0)
    first, second = attempts(world, failed.name)
    assert first["reason"] == "killed"
    assert second["start_step"] > 0
    assert failed.error is not None
    assert "\n" not in failed.error
    assert "worker" in failed.error

    first, second = attempts(world, fine.name)
    assert first["reason"] == "killed"
    assert second["start_step"] > 0
    assert_each_step_once(world, fine, 1500)
    assert [report["step"] for report in fine.reports] == [300, 600, 900, 1200, 1500]


def test_a_trial_that_needs_more_memory_than_there_is_is_infeasible_and_the_search_goes_on(world: World) -> None:
    """Its first matrix alone would be a terabyte."""
    space = [{**RANKS, "lora_rank": {"choice": [4_000_000_000, 8]}}]
    outcome = run(world, space, tune={"max_concurrent_trials": 1})
    huge, fine = outcome.book.trials
    assert (huge.state, fine.state, outcome.exit_code) == ("infeasible", "finished", 0)
    assert huge.error is not None
    assert "can't allocate memory" in huge.error
    assert "\n" not in huge.error


class NodeKiller:
    """Kills the node of one of two trials, once both have a checkpoint, and gives the cluster another one."""

    def __init__(self, world: World, nodes: RayNodes) -> None:
        self._world, self._nodes = world, nodes
        self.killed = ""

    def __call__(self, book: Book) -> None:
        if self.killed or len(book.trials) < 2 or not all(checkpointed(self._world, trial) for trial in book.trials):
            return
        groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
        held = [
            group["bundles_to_node_id"] for group in groups if any("CPU" in one for one in group["bundles"].values())
        ]
        self.killed = held[0][0]
        self._nodes.kill(self.killed)
        self._nodes.add(cpus=1)


def test_a_trial_whose_node_is_lost_goes_on_elsewhere_and_the_other_one_does_not_notice(
    world: World, nodes: RayNodes
) -> None:
    world = replace(world, address=nodes.address)
    for _ in range(2):
        nodes.add(cpus=1)
    killer = NodeKiller(world, nodes)
    outcome = run(world, [RANKS], killer, **STEPS)
    assert killer.killed
    assert [trial.state for trial in outcome.book.trials] == ["finished", "finished"]
    undisturbed, hit = sorted(outcome.book.trials, key=lambda trial: len(attempts(world, trial.name)))
    assert [len(attempts(world, trial.name)) for trial in (undisturbed, hit)] == [1, 2]
    assert attempts(world, hit.name)[1]["start_step"] > 0
    for trial in (undisturbed, hit):
        assert_each_step_once(world, trial, 1500)
        assert [report["step"] for report in trial.reports] == [300, 600, 900, 1200, 1500]


def test_the_board_of_a_search_is_on_the_node_of_its_driver(nodes: RayNodes) -> None:
    for _ in range(2):
        nodes.add(cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        boards = [open_board() for _ in range(6)]
        where = ray.get([board.__ray_call__.remote(_node) for board in boards])
        assert set(where) == {ray.get_runtime_context().get_node_id()}
    finally:
        ray.shutdown()


def _node(_: object) -> str:
    identifier: str = ray.get_runtime_context().get_node_id()
    return identifier


OF_RAY = "_AutoscalingCoordinatorActor"
"""Ray Train starts it for the first run of a cluster, and it stays as long as that."""


def left(nodes: RayNodes) -> list[str]:
    """What Ray's state and the system's table of processes say is left of trials."""
    groups = [group for group in list_placement_groups(limit=10_000) if group.state != "REMOVED"]
    actors = [one for one in list_actors(limit=10_000, filters=[("state", "=", "ALIVE")]) if one.class_name != OF_RAY]
    idle = ("ray::IDLE", f"ray::{OF_RAY}")
    busy = [name for name in nodes.processes() if name.startswith("ray::") and name not in idle]
    return [*(str(group) for group in groups), *(f"{actor.class_name} {actor.pid}" for actor in actors), *busy]


@pytest.mark.timeout(3600)
def test_nothing_is_left_of_thirty_trials_that_asha_has_stopped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates from good to bad: whoever comes after the first ones is stopped at the first rung."""
    rates = {"finetuning_type": "full", "learning_rate": {"choice": [1e-2 * 0.8**place for place in range(36)]}}
    with ray_nodes(dashboard=True) as nodes:
        world = replace(world, address=nodes.address)
        nodes.add(cpus=2)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)  # the state API asks the cluster that this names
        ray.init(address=nodes.address, log_to_driver=False)
        before = left(nodes)
        ray.shutdown()
        outcome = run(world, [rates], tune={"scheduler": "asha"}, ray_num_workers=1, max_steps=20, eval_steps=5)
        states = [trial.state for trial in outcome.book.trials]
        assert states.count("stopped") >= 30
        assert set(states) == {"stopped", "finished"}
        ray.init(address=nodes.address, log_to_driver=False)
        try:
            assert until(lambda: left(nodes) == before, 60), left(nodes)
        finally:
            ray.shutdown()
