"""The key `ray_node_types`: what a cluster's autoscaler can start, which it tells nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from tunefleet.recipe.problems import shown
from tunefleet.settings import Settings


class NodeTypeSettings(Settings):
    """Alike nodes that an autoscaler starts: an entry of `available_node_types`, as Ray's own files write it."""

    resources: dict[str, Annotated[float, Field(ge=0)]]
    max_workers: int = Field(ge=1)
    """So many nodes at the same time."""
    labels: dict[str, str] = Field(default_factory=dict)


def _read_node_types(value: object) -> object:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{shown(value)} is no mapping of node types; {_NODE_TYPES_MEND}")
    for name, one in value.items():
        if isinstance(one, NodeTypeSettings):
            continue
        known = isinstance(one, Mapping) and {"resources", "max_workers"} <= set(one) <= _NODE_TYPE_KEYS
        if not known or not _is_amounts(one["resources"]) or not _is_count(one["max_workers"]):
            raise ValueError(f"{name} is no node type: {shown(one)}; {_NODE_TYPES_MEND}")
    return value


def _is_amounts(value: object) -> bool:
    amounts = list(value.values()) if isinstance(value, Mapping) else []
    numbers = all(isinstance(amount, int | float) and not isinstance(amount, bool) for amount in amounts)
    return numbers and all(amount >= 0 for amount in amounts) and any(amount > 0 for amount in amounts)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_NODE_TYPE_KEYS = {"resources", "max_workers", "labels"}
_NODE_TYPES_MEND = "write {gpu: {resources: {GPU: 1, CPU: 8}, max_workers: 4}}, and labels if there are any"
_NODE_TYPE_SCHEMA = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "properties": {
            "resources": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
            "max_workers": {"type": "integer", "minimum": 1},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "required": ["resources", "max_workers"],
        "additionalProperties": False,
    },
}
NodeTypes = Annotated[dict[str, NodeTypeSettings], BeforeValidator(_read_node_types), WithJsonSchema(_NODE_TYPE_SCHEMA)]
