"""What Ray's own autoscaler (v2) makes of a cluster on Kubernetes: its node types, and what it would start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import autoscaler_pb2

Object = dict[str, Any]

_messages: Any = autoscaler_pb2  # made by protoc without types


def _config(cluster_spec: Object) -> dict[str, Any]:
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "c", "namespace": "n"}, "spec": cluster_spec}
    )
    return config


def node_types(cluster_spec: Object) -> dict[str, Any]:
    """Node types by name, the head's as `headgroup`."""
    types: dict[str, Any] = _config(cluster_spec)["available_node_types"]
    return types


def started_for(cluster_spec: Object, groups: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, int]:
    """How many nodes of each type would be started, from none, for placement groups with these bundles."""
    config = AutoscalingConfig(_config(cluster_spec), skip_content_hash=True)
    bundles = [[ResourceRequestUtil.make(dict(one)) for one in group] for group in groups]
    gangs = [_messages.GangResourceRequest(requests=group) for group in bundles]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=gangs,
        )
    )
    assert not reply.infeasible_gang_resource_requests
    started = {launch.instance_type: launch.count for launch in reply.to_launch}
    return {name: count for name, count in started.items() if name != "headgroup"}
