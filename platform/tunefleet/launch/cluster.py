"""Connecting to Ray, and what the cluster offers."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, and its stub leaves this out
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tunefleet
import tunefleet_strategies
from tunefleet.errors import Refused, RunFailed, first_line
from tunefleet.hardware import Hardware, local_cpu, local_gpu
from tunefleet.launch.job_folder import job_environment
from tunefleet.recipe.sections import RaySettings
from tunefleet.shapes import TRIAL_DRIVER, ClusterShape, NodeShape, NodeType, at_most

_COUNTED_APART = ("CPU", "GPU", "object_store_memory")  # the last is nothing that a worker can ask for
_WITHOUT_END = 64
"""Nodes of a type that a cluster publishes without a number."""

_ASKING_SECONDS = 30.0
"""How long a GPU that others may hold is asked what it can do."""

_RAY_DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray looks at its workers every two seconds, which a short run feels
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a worker stays where its files are
}
"""Switches of Ray that we set where the person has not."""

_DRIVERS_OWN = frozenset(
    ("runtime_env", "namespace", "log_to_driver", "logging_level", "logging_format", "logging_config", "job_config")
)
"""Arguments of `ray.init` that are about this driver; all others are about the Ray that is started."""

_LONGEST_END_SECONDS = 30.0

_KNOCKING_SECONDS = 10.0
"""How long nobody may listen at a cluster's address."""


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
    with ExitStack() as stack:
        if address is None:
            own = {key: value for key, value in options.items() if key in _DRIVERS_OWN}
            others = {key: value for key, value in options.items() if key not in own}
            address = stack.enter_context(_local_ray(others))
            _init({"address": address, **own, "runtime_env": _addressed(own.get("runtime_env") or {}, address)})
        else:
            _init({"address": address, **options, "runtime_env": _addressed(_runtime_env(options), address)})
        stack.callback(ray.shutdown)
        yield


@contextmanager
def _local_ray(options: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Ray on this machine for as long as the block lasts, or this process lives; its address.

    It runs in a session of its own (`local_ray.py`): a signal that a shell or `timeout` sends to the driver's group
    would otherwise end Ray under the run that is saving its last checkpoint.

    Raises:
        Refused, RunFailed: Ray does not take the options, or does not start.
    """
    # Ray turns token authentication on for local clusters, for who joins them only where this says so. Without a token
    # it would write one to the home folder, which would turn authentication on in clusters that are started later.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # Ray has read the environment when it was imported
    options = {"include_dashboard": False, "num_cpus": _own_cpus(), **options}
    # -P: the neighbours of the script stay off its import path.
    command = [sys.executable, "-P", str(Path(__file__).with_name("local_ray.py"))]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**(environment or {}), **os.environ},
    ) as ray_process:
        assert ray_process.stdin is not None
        assert ray_process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended, and the answer says why
                ray_process.stdin.write(json.dumps(options) + "\n")
                ray_process.stdin.flush()
            told = json.loads(ray_process.stdout.readline() or "{}")
            if "refused" in told:
                raise _refused_arguments(told["refused"])
            if "address" not in told:
                raise RunFailed(
                    f"Ray did not start on this machine ({told.get('failed', 'its process ended')}): look for what "
                    f"holds it up in /tmp/ray/session_latest/logs, and try again."
                )
            yield told["address"]
        finally:
            ray_process.stdin.close()  # the sign to end
            try:
                ray_process.wait(_LONGEST_END_SECONDS)
            except subprocess.TimeoutExpired:
                ray_process.kill()  # its own children die with it


@contextmanager
def search_session(settings: RaySettings) -> Iterator[None]:
    """As `ray_session`, for many runs at once: with Ray's dashboard, and with the cluster's address in every process.

    What frees the workers of a trial whose driver died asks the dashboard, and finds it by RAY_ADDRESS (ray #54305). On
    this machine Ray therefore runs in a process of its own, which ends when this one does, whatever ends it.

    Raises:
        Refused, RunFailed: as `ray_session`.
    """
    for name, value in _RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    with ExitStack() as stack:
        address = cluster_address(settings)
        written: dict[str, Any] = dict(settings.ray_init_kwargs)
        shared: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            options = shared | {key: value for key, value in written.items() if key in _DRIVERS_OWN}
        else:
            options = shared | written
        environment = _runtime_env(options)
        if address is None:
            own = {key: value for key, value in written.items() if key not in _DRIVERS_OWN and value is not None}
            own["resources"] = {TRIAL_DRIVER: 1000.0, **own.get("resources", {})}
            # Each trial has half a dozen small actors of Ray's: no warning about their number, no queue at their start.
            more = {"RAY_worker_maximum_startup_concurrency": "16"}
            address = stack.enter_context(_local_ray({"include_dashboard": True, **own}, more))
        elif re.fullmatch(r"[\w.-]+:\d+", address) is None:  # "auto", or a client's URI
            _init({**options, "address": address, "runtime_env": environment})
            address = ray.get_runtime_context().gcs_address
            ray.shutdown()
        switches = {name: os.environ[name] for name in _RAY_DEFAULTS}
        told = {**switches, "RAY_ADDRESS": address, **environment.get("env_vars", {})}
        stack.callback(ray.shutdown)
        _init({**options, "address": address, "runtime_env": {**environment, "env_vars": told}})
        yield


def _init(options: Mapping[str, Any]) -> None:
    _refuse_unanswered(options["address"])
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        if "keyword argument" in str(error):
            raise _refused_arguments(first_line(error)) from error
        raise Refused(
            f"No Ray cluster answers at {options['address']} ({first_line(error)}): start one with "
            f"`ray start --head`, or leave ray_address out to run on this machine."
        ) from error
    except (TypeError, ValueError) as error:
        if "address" in str(error).lower():
            raise Refused(
                f"ray_address: {options['address']} is no address ({first_line(error)}): write host:port, "
                f"ray://host:10001 or auto."
            ) from error
        raise _refused_arguments(first_line(error)) from error


def _refuse_unanswered(address: str) -> None:
    """See that somebody listens at an address: Ray itself goes on knocking for a quarter of an hour, without a word.

    Raises:
        Refused: nobody does, for `_KNOCKING_SECONDS`.
    """
    named = re.fullmatch(r"(?:ray://)?([\w.-]+):(\d{1,5})", address)
    if named is None:
        return
    end = time.monotonic() + _KNOCKING_SECONDS
    while True:
        try:
            with socket.create_connection((named[1], int(named[2])), timeout=_KNOCKING_SECONDS):
                return
        except (OSError, OverflowError) as error:
            if time.monotonic() + 1 > end:
                raise Refused(
                    f"No Ray cluster answers at {address} ({first_line(error)}): start one with `ray start --head`, "
                    f"correct ray_address, or leave it out to run on this machine."
                ) from error
        time.sleep(1)


def _refused_arguments(reason: str) -> Refused:
    return Refused(f"Ray does not take these arguments ({reason}): correct ray_init_kwargs.")


def _runtime_env(options: Mapping[str, Any]) -> dict[str, Any]:
    """This very code for the workers of a cluster, unless a submitted job has brought it.

    `py_modules: []`, which Ray itself does not take, says that the cluster has it.
    """
    own: dict[str, Any] = dict(options.get("runtime_env") or {})
    if "py_modules" not in own and "py_modules" not in job_environment():
        own["py_modules"] = [str(Path(package.__path__[0])) for package in (tunefleet, tunefleet_strategies)]
    return {key: value for key, value in own.items() if not (key == "py_modules" and value == [])}


def _addressed(environment: Mapping[str, Any], address: str) -> dict[str, Any]:
    """The same runtime environment with the cluster's address in every process.

    What frees the workers of a driver that died asks Ray's State API, which would ask any other cluster of this machine
    and believe it that this one's controller is dead: a run would lose its workers when another one starts.
    """
    if re.fullmatch(r"[\w.-]+:\d+", address) is None:  # "auto", or a client's URI: the cluster's own setting holds
        return dict(environment)
    return {**environment, "env_vars": {"RAY_ADDRESS": address, **environment.get("env_vars", {})}}


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
            others={
                "memory": float(written.get("_memory", psutil.virtual_memory().total)),  # at most: Ray keeps some of it
                **{name: float(amount) for name, amount in written.get("resources", {}).items()},
            },
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise Refused(
            "num_cpus, num_gpus or resources in ray_init_kwargs are no amounts: write num_cpus: 4 or resources: {a: 1}."
        ) from error
    return ClusterShape(nodes=(node,), cpu=local_cpu(), gpu=gpu)


def joined_shape(settings: RaySettings) -> ClusterShape:
    """The cluster that this process is connected to, as large as it may become."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    shapes = tuple(_node_shape(node["Resources"], node["Labels"]) for node in alive)
    # A head that gives no CPU to workers says nothing about those that will train.
    working = [node for node, shape in zip(alive, shapes, strict=True) if shape.cpus > 0] or alive
    cpu = _cpu_of(working[0]["NodeID"])
    gpu: Hardware | None = None
    if any(shape.gpus > 0 for shape in shapes):
        asked = ray.remote(num_cpus=0, num_gpus=0.01)(local_gpu).remote()
        try:
            gpu = ray.get(asked, timeout=_ASKING_SECONDS)
        except GetTimeoutError:  # other jobs hold all of them
            ray.cancel(asked, force=True)
    types = node_types(settings)
    nodes = at_most(shapes, types) if types else shapes
    return ClusterShape(nodes=nodes, cpu=cpu, gpu=gpu, may_grow=True, node_types=types)


def _cpu_of(node_id: str) -> Hardware:
    """The processor of a node. That of this one is known here; another one is asked by a process that starts there."""
    if not ray.util.client.ray.is_connected() and node_id == ray.get_runtime_context().get_node_id():
        return local_cpu()
    there: Any = NodeAffinitySchedulingStrategy(node_id, soft=True)
    found: Hardware = ray.get(ray.remote(num_cpus=0, scheduling_strategy=there)(local_cpu).remote())
    return found


def node_types(settings: RaySettings) -> tuple[NodeType, ...]:
    """What the autoscaler of the cluster can start: as the recipe says, else as the cluster publishes.

    Ray's open autoscaler publishes nothing; what does writes where Ray Train and Ray Data look for it too.
    """
    written = settings.ray_node_types
    if written:
        return tuple(
            NodeType(name, _type_shape(one.resources, one.labels), one.max_workers) for name, one in written.items()
        )
    if ray.util.client.ray.is_connected():  # behind a client's URI nothing is at hand that could be asked
        return ()
    published = ray._private.state.state.get_cluster_config()
    groups = () if published is None else published.node_group_configs
    return tuple(
        NodeType(one.name, _type_shape(one.resources), _WITHOUT_END if one.max_count < 0 else one.max_count)
        for one in groups
        if one.max_count
    )


def _type_shape(resources: Mapping[str, float], labels: Mapping[str, str] | None = None) -> NodeShape:
    """A node of a type; where nobody says how much memory it has, that is no limit."""
    return _node_shape({"memory": math.inf, **resources}, labels)


def alive_nodes() -> dict[str, NodeShape]:
    """What each node of the cluster offers, by its id."""
    return {node["NodeID"]: _node_shape(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]}


def _node_shape(resources: Mapping[str, float], labels: Mapping[str, str] | None = None) -> NodeShape:
    others = {
        name: amount
        for name, amount in resources.items()
        if name not in _COUNTED_APART and not name.startswith("node:")
    }
    return NodeShape(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0), others=others, labels=labels)
