"""Small actors that must live as long as the driver."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def beside_driver(kind: type) -> Any:  # a Ray actor handle, which Ray does not type
    """Start an actor that takes no CPU on this process's node: Ray would take any, and others may be lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(kind)
    return actor.options(scheduling_strategy=here).remote()
