"""Small objects that are right, and ways to put a typo into one."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

FREE = frozenset(
    {
        *("labels", "annotations", "matchLabels", "nodeSelector", "requests", "limits", "data", "nodeLabels"),
        *("rayStartParams", "resources", "headServiceAnnotations", "clusterSelector"),
    }
)
"""Fields whose keys people choose; `resources` is one of them in a group of Ray's, and typed elsewhere."""


def pod(name: str = "ray", **spec: Any) -> Object:
    return {"spec": {"containers": [{"name": name, "image": "tunefleet:1"}], **spec}}


def cluster_spec(**more: Any) -> Object:
    group = {"groupName": "workers", "replicas": 1, "minReplicas": 0, "maxReplicas": 2, "template": pod()}
    return {"rayVersion": "2.60.0", "headGroupSpec": {"template": pod()}, "workerGroupSpecs": [group], **more}


def ray_cluster(**more: Any) -> Object:
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "c"}, "spec": cluster_spec(**more)}


def ray_job(**more: Any) -> Object:
    spec = {"entrypoint": "tunefleet train r.yaml", "rayClusterSpec": cluster_spec(), **more}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "j"}, "spec": spec}


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every field of an object: the way to the mapping that has it, and its key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield path, key
            typed = key == "resources" and (isinstance(inner, list) or inner.keys() & {"requests", "limits"})
            if key not in FREE or typed:
                yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def with_typo(document: Object, chance: random.Random) -> tuple[Object, str]:
    """A copy with one letter of one field's name left out, doubled, or in the wrong case; and the wrong name."""
    spoiled = copy.deepcopy(document)
    path, key = chance.choice(list(places(spoiled)))
    holder: Any = spoiled
    for step in path:
        holder = holder[step]
    index = chance.randrange(len(key))
    wrong = chance.choice(
        [key[:index] + key[index + 1 :], key[:index] + key[index] + key[index:], key[:index] + key[index:].swapcase()]
    )
    items = [(wrong if name == key else name, value) for name, value in holder.items()]
    holder.clear()
    holder.update(items)
    return spoiled, wrong
