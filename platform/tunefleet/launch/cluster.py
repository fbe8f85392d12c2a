"""Connecting to Ray, and what the cluster offers."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

import tunefleet
import tunefleet_strategies
from tunefleet.errors import Refused, RunFailed
from tunefleet.hardware import Hardware, local_cpu, local_gpu
from tunefleet.recipe.sections import RaySettings
from tunefleet.shapes import ClusterShape, NodeShape

_BUILT_IN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")

_RAY_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray looks at its workers every two seconds, which a short run feels
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a worker stays where its files are
}
"""Switches of Ray that we set where the person has not."""

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a submitted job's script its own runtime environment."""


def cluster_address(settings: RaySettings) -> str | None:
    """The existing cluster that a run joins; None = start Ray on this machine."""
    return settings.ray_address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Start Ray on this machine, or join the cluster of `cluster_address`; leave it at the end.

    Raises:
        Refused: there is no cluster at the address, or `ray_init_kwargs` are not what Ray takes.
    """
    for name, value in _RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", **settings.ray_init_kwargs}
    address = cluster_address(settings)
    if address is None:
        # Ray turns token authentication on for local clusters. Without a token it would write one to the home folder,
        # which would turn authentication on in clusters that are started later.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # An explicit "local" never joins a dead cluster that an old session file names.
        _init({"address": "local", "include_dashboard": False, "num_cpus": _own_cpus(), **options})
    else:
        _init({"address": address, **options, "runtime_env": _runtime_env(options)})
    try:
        yield
    finally:
        ray.shutdown()


def _init(options: Mapping[str, Any]) -> None:
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        if options["address"] == "local":
            raise RunFailed(
                f"Ray did not start on this machine ({_first_line(error)}): look for what holds it up in /tmp/ray/"
                f"session_latest/logs, and try again."
            ) from error
        raise Refused(
            f"No Ray cluster answers at {options['address']} ({_first_line(error)}): start one with "
            f"`ray start --head`, or leave ray_address out to run on this machine."
        ) from error
    except (TypeError, ValueError) as error:
        raise Refused(f"Ray does not take these arguments ({_first_line(error)}): correct ray_init_kwargs.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _runtime_env(options: Mapping[str, Any]) -> dict[str, Any]:
    """This very code for the workers of a cluster, unless a submitted job has brought it.

    `py_modules: []`, which Ray itself does not take, says that the cluster has it.
    """
    own: dict[str, Any] = dict(options.get("runtime_env") or {})
    job = json.loads(os.environ.get(_JOB_CONFIG, "{}"))
    if "py_modules" not in own and "py_modules" not in job.get("runtime_env", {}):
        own["py_modules"] = [str(Path(package.__path__[0])) for package in (tunefleet, tunefleet_strategies)]
    return {key: value for key, value in own.items() if not (key == "py_modules" and value == [])}


def _own_cpus() -> int:
    return len(psutil.Process().cpu_affinity() or []) or psutil.cpu_count() or 1


def local_shape(settings: RaySettings) -> ClusterShape:
    """This machine as Ray would count it, without starting Ray.

    Raises:
        Refused: `ray_init_kwargs` has other things than amounts for it.
    """
    gpu = local_gpu()
    count = 0
    if gpu is not None:
        import torch

        count = torch.cuda.device_count()
    written: dict[str, Any] = {key: value for key, value in settings.ray_init_kwargs.items() if value is not None}
    try:
        node = NodeShape(
            cpus=float(written.get("num_cpus", _own_cpus())),
            gpus=float(written.get("num_gpus", count)),
            others={name: float(amount) for name, amount in written.get("resources", {}).items()},
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise Refused(
            "num_cpus, num_gpus or resources in ray_init_kwargs are no amounts: write num_cpus: 4 or resources: {a: 1}."
        ) from error
    return ClusterShape(nodes=(node,), cpu=local_cpu(), gpu=gpu)


def joined_shape() -> ClusterShape:
    """The cluster that this process is connected to."""
    nodes = tuple(_node_shape(node["Resources"]) for node in ray.nodes() if node["Alive"])
    cpu: Hardware = ray.get(ray.remote(num_cpus=0)(local_cpu).remote())
    gpu: Hardware | None = None
    if any(node.gpus > 0 for node in nodes):
        gpu = ray.get(ray.remote(num_cpus=0, num_gpus=0.01)(local_gpu).remote())
    return ClusterShape(nodes=nodes, cpu=cpu, gpu=gpu)


def _node_shape(resources: Mapping[str, float]) -> NodeShape:
    custom = {
        name: amount
        for name, amount in resources.items()
        if name not in _BUILT_IN_RESOURCES and not name.startswith("node:")
    }
    return NodeShape(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0), others=custom)
