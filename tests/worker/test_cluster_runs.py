"""Runs on a cluster of several nodes (real raylets on this machine): who sits where, with what, and who has to wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.util import placement_group_table
from tests.cluster import RayNodes, ray_nodes
from tests.worker.under_ray import Watching, World

from tunefleet.errors import RunFailed
from tunefleet.worker.events import Event, Started, Stepped, Worker

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class TwoNodes:
    """A head without CPUs, as on Kubernetes, and two nodes with two each and a home, so a token cache, of their own."""

    cluster: RayNodes
    nodes: list[str]
    homes: list[Path]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    homes = [tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("home")]
    with ray_nodes() as cluster:
        yield TwoNodes(cluster, [cluster.add(cpus=2, home=home) for home in homes], homes)


@pytest.fixture
def there(two: TwoNodes, tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> World:
    return World(tmp_path, tiny_model, quickstart_world, two.cluster.address)


class Census:
    """Keeps who the workers are, and the placement group while it is alive."""

    def __init__(self) -> None:
        self.workers: tuple[Worker, ...] = ()
        self.groups: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.workers = event.workers
        if isinstance(event, Stepped) and len(self.groups) != 1:
            self.groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]

    @property
    def group(self) -> dict[str, Any]:
        (found,) = self.groups
        return found


def short(there: World, name: str, workers: int, **more: object) -> dict[str, object]:
    return there.keys(name, "lora_dropout", workers) | {"max_steps": 150, "save_strategy": "no", **more}


def run(there: World, keys: dict[str, object]) -> Census:
    from tunefleet.recipe.read import read_flat

    census = Census()
    assert there.run(read_flat(keys), Watching(census)).exit_code == 0
    return census


@pytest.mark.slow
def test_four_workers_on_two_nodes_and_a_head_without_cpus(there: World, two: TwoNodes) -> None:
    """Local ranks, threads and backend; each node tokenises once, and the driver's home is a third."""
    census = run(
        there, short(there, "four", 4, cache_dir=None, placement_strategy="SPREAD", max_samples=60, max_steps=2)
    )
    workers = census.workers
    assert [worker.rank for worker in workers] == [0, 1, 2, 3]
    by_node = {node: [worker for worker in workers if worker.node == node] for node in two.nodes}
    for sitting in by_node.values():
        assert sorted(worker.local_rank for worker in sitting) == [0, 1]
        assert sum(worker.made_data for worker in sitting) == 1
    assert {(worker.device, worker.backend, worker.threads) for worker in workers} == {("cpu", "gloo", 1)}
    for home in two.homes:
        made = [one for one in (home / ".cache" / "tunefleet").iterdir() if one.is_dir()]
        assert len(made) == 1


@pytest.mark.slow
def test_what_a_node_has_tokenised_stays_there(there: World) -> None:
    run(there, short(there, "once", 4, cache_dir=None, max_samples=50, max_steps=2))
    again = run(there, short(there, "again", 4, cache_dir=None, max_samples=50, max_steps=2))
    assert not any(worker.made_data for worker in again.workers)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "nodes"), [("SPREAD", 2), ("STRICT_PACK", 1), ("STRICT_SPREAD", 2)])
def test_workers_are_laid_out_as_the_recipe_says(there: World, two: TwoNodes, strategy: str, nodes: int) -> None:
    census = run(there, short(there, strategy.lower(), 2, placement_strategy=strategy))
    assert census.group["strategy"] == strategy
    assert len({worker.node for worker in census.workers}) == nodes
    assert set(census.group["bundles_to_node_id"].values()) == {worker.node for worker in census.workers}
    assert {worker.node for worker in census.workers} <= set(two.nodes)


@pytest.mark.slow
def test_half_a_cpu_is_half_a_cpu(there: World) -> None:
    census = run(there, short(there, "halves", 4, resources_per_worker={"CPU": 0.5}, placement_strategy="STRICT_PACK"))
    assert list(census.group["bundles"].values()) == [{"CPU": 0.5}] * 4
    assert len({worker.node for worker in census.workers}) == 1
    assert {worker.threads for worker in census.workers} == {1}


def test_what_the_cluster_can_never_hold_is_reported_after_a_stated_time(there: World) -> None:
    from tunefleet.recipe.read import read_flat

    keys = short(there, "never", 3, resources_per_worker={"CPU": 2}, ray_start_timeout=8, placement_strategy="SPREAD")
    watching = Watching()
    with pytest.raises(RunFailed) as caught:
        there.run(read_flat(keys), watching)
    assert "asked for are 3 x (2 CPU), SPREAD; free are 4 CPU; 3 nodes have 4 CPU; missing are 2 CPU" in str(
        caught.value
    )
    assert "ray_start_timeout: 8 s" in str(caught.value)
    assert any("the run waits until nodes have joined" in note for note in watching.notes)


@pytest.mark.slow
def test_a_node_that_is_lost_and_not_replaced_ends_the_run_with_what_is_missing(there: World, two: TwoNodes) -> None:
    """The last test of this file: a node goes."""
    from tunefleet.recipe.read import read_flat

    gone: list[str] = []

    def react(event: Event) -> None:
        if isinstance(event, Stepped) and event.step.step >= 30 and not gone:
            gone.append(two.nodes[1])
            two.cluster.kill(two.nodes[1])

    keys = short(there, "lost", 2, resources_per_worker={"CPU": 2}, ray_start_timeout=30, max_steps=100_000)
    keys |= {"save_strategy": "steps", "save_steps": 20, "ddp_timeout": 20}
    with pytest.raises(RunFailed, match=r"asked for are 2 x \(2 CPU\).*missing are 2 CPU.*ray_start_timeout: 30 s"):
        there.run(read_flat(keys), Watching(react))
    assert gone
