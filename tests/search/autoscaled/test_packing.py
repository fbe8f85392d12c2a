"""The end of a search whose nodes go when they are idle: its last trials come together on one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.util import placement_group_table
from tests.cluster import ray_nodes
from tests.search.under_tune import LORA, Watching, attempts, searched
from tests.worker.under_ray import World

from tunefleet.search import packing
from tunefleet.search.book import Book
from tunefleet.search.tuner import tune

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(600)]

UPDATES = 4000


def test_the_last_trials_share_a_node_and_lose_no_step(
    tmp_path: Path, tiny_model: Path, quickstart_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray lays two trials over two nodes that would hold both of them each."""
    monkeypatch.setattr(packing, "WORTH_SECONDS", 2.0)
    seen: list[frozenset[str]] = []

    def react(book: Book) -> None:
        groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
        held = [set(group["bundles_to_node_id"].values()) for group in groups if group["bundles"][0].get("CPU")]
        if len(held) == 2:
            seen.append(frozenset(held[0] | held[1]))

    with ray_nodes(dashboard=True) as cluster:
        for _ in range(2):
            cluster.add(cpus=2)
        world = World(tmp_path, tiny_model, quickstart_world, cluster.address)
        keys: dict[str, Any] = {
            "max_steps": UPDATES,
            "save_steps": UPDATES,
            "eval_steps": UPDATES,
            "logging_steps": 100,
        }
        types = {"pair": {"resources": {"CPU": 2}, "max_workers": 2}}
        space = [{**LORA, "ray_num_workers": 1, "lora_rank": {"choice": [2, 4]}}]
        display = Watching(react)
        outcome = tune(searched(world, space, ray_node_types=types, **keys), display, world.folder)

    assert [trial.state for trial in outcome.book.trials] == ["finished"] * 2
    assert len(seen[0]) == 2
    assert len(seen[-1]) == 1
    made = [attempts(world, trial.name) for trial in outcome.book.trials]
    (moved,) = [one for one in made if len(one) == 2]
    assert sum(len(one) for one in made) == 3, "one of them moved, once"
    assert moved[1]["start_step"] == moved[0]["end_step"]
    assert sum(int(str(attempt["executed_steps"])) for attempt in moved) == UPDATES
    assert sum("moves to a node that others are on" in note for note in display.notes) == 1
