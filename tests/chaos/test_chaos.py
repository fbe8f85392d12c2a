"""Twenty runs over all methods and engines, each hit between two checkpoints: each is the run that nothing happened to.

`make chaos` runs them, prints what was hit when and what it cost, and looks for what they have left behind.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.state import list_actors, list_placement_groups
from tests.chaos.blows import (
    BLOWS,
    ENGINES,
    Blow,
    Damage,
    Once,
    cut,
    kill_all_workers,
    kill_node,
    kill_worker,
    run_watched,
    run_with_driver_killed,
)
from tests.cluster import RayNodes
from tests.s3_server import Server, Way, uri
from tests.worker.under_ray import World

from tunefleet.artifacts.metrics import TIMING_FIELDS, read_metrics
from tunefleet.recipe.read import read_flat

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(900)]

LIVE: list[str] = []
"""The nodes of the cluster, two at any time."""


def traces(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Lines and hashes of a finished run, from what it left for a person."""
    lines = [
        {k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in read_metrics(folder / "metrics.jsonl")
    ]
    return lines, json.loads((folder / "result.json").read_text())["fingerprints"]


def attempts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("blow", BLOWS, ids=lambda blow: blow.name)
def test_a_run_that_is_hit_is_the_run_that_was_not(
    tmp_path: Path,
    tiny_model: Path,
    quickstart_world: Path,
    nodes: RayNodes,
    bucket: Server,
    seed: int,
    damages: list[Damage],
    blow: Blow,
) -> None:
    while len(LIVE) < 2:
        LIVE.append(nodes.add(cpus=1))
    world = World(tmp_path, tiny_model, quickstart_world, nodes.address)
    own = {"max_steps": blow.updates, **ENGINES[blow.engine]}
    assert world.run(read_flat(world.keys("twin", blow.method, blow.workers, **own))).exit_code == 0

    keys = world.keys("hit", blow.method, blow.workers, **own)
    step = blow.step(seed)
    damage = strike(blow, world, keys, step, nodes, bucket, random.Random(f"{seed} {blow.name}"))
    damages.append(damage)
    assert traces(world.folder / "hit") == traces(world.folder / "twin")


def strike(
    blow: Blow,
    world: World,
    keys: dict[str, object],
    step: int,
    nodes: RayNodes,
    bucket: Server,
    draw: random.Random,
) -> Damage:
    """Do it, and see that exactly the steps behind the newest checkpoint were taken again."""
    folder = world.folder / "hit"
    if blow.victim == "storage":
        way = Way(bucket)
        try:
            keys |= {"ray_storage_path": uri(f"chaos/{blow.name}", way.host)}
            once = Once(step, lambda _: cut(way))
            run_watched(world, keys, once)
            assert not way.is_cut
        finally:
            way.close()
        assert [(one["reason"], one["executed_steps"]) for one in attempts(folder)] == [("finished", blow.updates)]
        assert once.hit_step is not None
        return Damage(blow, once.hit_step, 0)
    if blow.victim == "driver":
        hit = last_step = run_with_driver_killed(world, keys, step)
    else:
        record = str(world.record("hit"))
        blows: dict[str, Callable[[Sequence[str]], None]] = {
            "worker": lambda _: kill_worker(record),
            "workers": lambda seats: kill_all_workers(nodes, seats),
            "raylet": lambda seats: kill_node(nodes, LIVE, draw.choice(seats)),
        }
        once = Once(step, blows[blow.victim])
        run_watched(world, keys, once)
        assert once.hit_step is not None
        hit, last_step = once.hit_step, once.last_step
    first, last = attempts(folder)
    assert first["reason"] != "finished"
    assert last["reason"] == "finished"
    assert 0 < last["start_step"] < blow.updates
    assert last["executed_steps"] == blow.updates - last["start_step"]
    return Damage(blow, hit, max(0, last_step - last["start_step"]))


def test_nothing_is_left_behind(nodes: RayNodes, damages: list[Damage], monkeypatch: pytest.MonkeyPatch) -> None:
    """After all of them: no placement group, no actor of a run, no process of one, no temporary folder."""
    assert damages, "this looks at what the runs before it have left"
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        groups = [group for group in list_placement_groups() if group.state not in ("REMOVED", "INFEASIBLE")]
        assert groups == []
        own = {"Mailbox", "RayTrainWorker", "TrainController", "SynchronizationActor", "DatasetManager"}
        alive = [actor for actor in list_actors() if actor.state == "ALIVE" and actor.class_name in own]
        assert alive == []
    finally:
        ray.shutdown()
    assert [name for name in nodes.processes() if name.startswith("ray::RayTrainWorker")] == []
    since = psutil.Process().create_time()  # what others left before is theirs
    scratch = Path(tempfile.gettempdir()).glob("tunefleet-*")
    assert [folder for folder in scratch if folder.stat().st_mtime >= since] == []
