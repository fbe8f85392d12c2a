"""Searches on Ray's own autoscaler: from no node to as many as trials can use, through a loss, and back to none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.util import placement_group_table
from tests.autoscaling import Autoscaled, NodeTypes, autoscaled, most_together
from tests.search.under_tune import LORA, RATIO, Watching, attempts, searched, until
from tests.worker.under_ray import World

from tunefleet.errors import Refused
from tunefleet.search.book import Book
from tunefleet.search.tuner import SearchOutcome, tune
from tunefleet.shapes import SINGLE_WORKER

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(600)]

SINGLE: dict[str, Any] = {"resources": {"CPU": 1}, "max_workers": 2, "labels": {SINGLE_WORKER: "true"}}
PAIR: dict[str, Any] = {"resources": {"CPU": 2}, "max_workers": 1}
MIXED: NodeTypes = {"single": SINGLE, "pair": PAIR}
# The head would take 16 s to believe that a node is gone.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


@dataclass
class Placed:
    """On which types of node the worker bundles of each placement group were seen, and how many ran at once."""

    cluster: Autoscaled
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    most_running: int = 0

    def __call__(self, book: Book) -> None:
        types = {life.node_id: life.type for life in self.cluster.lives()}
        for name, group in placement_group_table().items():
            own = [index for index, bundle in group["bundles"].items() if bundle.get("CPU")]
            if own and group["state"] == "CREATED":
                nodes = group["bundles_to_node_id"]
                self.groups[name] = tuple(sorted(types.get(nodes[index], "head") for index in own))
        self.most_running = max(self.most_running, sum(trial.state == "running" for trial in book.trials))


@contextmanager
def world_of(
    tmp_path: Path, model: Path, data: Path, types: NodeTypes, **more: Any
) -> Iterator[tuple[World, Autoscaled]]:
    home = tmp_path / "home"
    home.mkdir()
    with autoscaled(home, types, drivers=6, variables=IMPATIENT, **more) as cluster:
        yield World(tmp_path, model, data, cluster.address), cluster


def run(
    world: World, cluster: Autoscaled, space: Any, react: Any = None, **more: Any
) -> tuple[SearchOutcome, Watching]:
    display = Watching(react)
    keys = {"ray_node_types": cluster.types, **more}
    return tune(searched(world, space, **keys), display, world.folder), display


def test_a_mixed_search_grows_from_no_node_to_what_its_trials_can_use_and_back(
    tmp_path: Path, tiny_model: Path, quickstart_world: Path
) -> None:
    """LoRA on two workers holds the pair; meanwhile ratio trials, chosen later, hold both single nodes."""
    space = [{**LORA, "lora_rank": {"choice": [2, 4]}}, {**RATIO, "badam_switch_interval": {"choice": [3, 4]}}]
    with world_of(tmp_path, tiny_model, quickstart_world, MIXED) as (world, cluster):
        assert cluster.alive() == {}
        placed = Placed(cluster)
        outcome, display = run(world, cluster, space, placed)
        assert outcome.exit_code == 0
        assert [trial.state for trial in outcome.book.trials] == ["finished"] * 4
        assert display.at_once == 4
        assert placed.most_running == 3
        assert sorted(placed.groups.values()) == [("pair", "pair")] * 2 + [("single",)] * 2
        lives = cluster.lives()
        assert (most_together(lives, "single"), most_together(lives, "pair"), most_together(lives)) == (2, 1, 3)
        assert len(lives) == 3, "none was started twice"
        assert until(lambda: not cluster.alive(), 60)


def test_a_search_survives_the_loss_of_a_node(tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> None:
    """The trial that was on it goes on from its checkpoint, on a node that is started in its place."""
    space = [{**RATIO, "badam_switch_interval": {"choice": [3, 4]}}]
    with world_of(tmp_path, tiny_model, quickstart_world, {"single": SINGLE}) as (world, cluster):
        killed: list[str] = []

        def react(book: Book) -> None:
            under_way = [trial for trial in book.trials if trial.state == "running"]
            if not killed and len(under_way) == 2 and all(trial.steps >= 20 for trial in under_way):
                killed.append(next(iter(cluster.alive())))
                cluster.kill(killed[0])

        outcome, _ = run(world, cluster, space, react, max_steps=400, save_steps=20)
        assert killed
        assert [trial.state for trial in outcome.book.trials] == ["finished"] * 2
        starts = [[attempt["start_step"] for attempt in attempts(world, trial.name)] for trial in outcome.book.trials]
        (hit,) = [one for one in starts if len(one) > 1]
        assert hit[0] == 0
        assert int(str(hit[1])) >= 20, "it went on from a checkpoint"
        assert len(cluster.lives()) == 3
        assert until(lambda: not cluster.alive(), 60)


def test_warm_trials_keep_their_nodes_and_get_those_that_have_what_they_ask_for(
    tmp_path: Path, tiny_model: Path, quickstart_world: Path
) -> None:
    """Accelerators are a resource of their own here. More of them than there can be are refused before the start."""
    types: NodeTypes = {
        "cpu": {"resources": {"CPU": 1}, "max_workers": 2},
        "gpu": {"resources": {"CPU": 1, "A100": 1}, "max_workers": 2},
    }
    asked: dict[str, Any] = {"resources_per_worker": {"CPU": 1, "A100": 1}}
    with world_of(tmp_path, tiny_model, quickstart_world, types) as (world, cluster):
        lora = {**LORA, "ray_num_workers": {"choice": [1, 3]}}
        with pytest.raises(
            Refused, match=r"tune.space, lora: ray_num_workers: 3 .* does not fit .* gpu \(1 CPU, 1 A100"
        ):
            run(world, cluster, [lora], per_device_train_batch_size=3, **asked)
        assert cluster.lives() == []

        outcome, display = run(world, cluster, [RATIO], tune={"trial_host": "warm"}, **asked)
        assert [trial.state for trial in outcome.book.trials] == ["finished"] * 4
        assert display.at_once == 2
        assert [life.type for life in cluster.lives()] == ["gpu", "gpu"]
        assert until(lambda: not cluster.alive(), 60)
