"""A run over several nodes outlives the loss of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.cluster import RayNodes, ray_nodes
from tests.worker.test_resume import assert_resumed_like_twin
from tests.worker.under_ray import SAVE_STEPS, Watching, World

from tunefleet.worker.events import Event, Saved, Stepped

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as started:
        yield started


class NodeKiller:
    """Kills a node once, between two checkpoints, and gives the cluster another one."""

    def __init__(self, nodes: RayNodes, node: str, step: int) -> None:
        self._nodes, self._node, self._step = nodes, node, step
        self._saved = False
        self.killed = False

    def __call__(self, event: Event) -> None:
        self._saved = self._saved or isinstance(event, Saved)
        if not self.killed and self._saved and isinstance(event, Stepped) and event.step.step >= self._step:
            self.killed = True
            self._nodes.kill(self._node)
            self._nodes.add(cpus=1)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("method", ["lora_dropout", "badam_random"])
def test_a_killed_node_costs_the_steps_since_the_checkpoint(
    world: World, nodes: RayNodes, method: str, victim: int
) -> None:
    """Whichever of the two nodes goes: nothing of the run but a worker may live there."""
    world = replace(world, address=nodes.address)
    both = [nodes.add(cpus=1), nodes.add(cpus=1)]
    world.run_twin(method, 2)
    killer = NodeKiller(nodes, both[victim], SAVE_STEPS + 3)
    outcome = world.run(world.recipe("killed", method, 2), Watching(killer))
    assert killer.killed
    assert outcome.exit_code == 0
    reason = world.attempts("killed")[0]["reason"]  # rank 0 was killed, or missed its neighbour
    assert reason == "killed" or reason.startswith("failed: ")
    assert_resumed_like_twin(world, "killed", [reason, "finished"])
