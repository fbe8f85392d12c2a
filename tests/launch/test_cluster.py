"""What a machine offers and which cluster a run joins, without starting Ray."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.core.generated import autoscaler_pb2
from ray.experimental import internal_kv

import tunefleet
import tunefleet_strategies
from tunefleet.errors import Refused
from tunefleet.hardware import local_cpu
from tunefleet.launch.cluster import (
    _node_shape,
    _runtime_env,
    cluster_address,
    joined_shape,
    local_shape,
    node_types,
    ray_session,
)
from tunefleet.launch.job_folder import JOB_CONFIG
from tunefleet.recipe.sections import RaySettings
from tunefleet.shapes import NodeShape

_messages: Any = autoscaler_pb2  # made by protoc without types
OURS = [str(Path(str(package.__file__)).parent) for package in (tunefleet, tunefleet_strategies)]


# ---- this machine ---------------------------------------------------------------------------------------------------


def test_this_machine_has_the_cpus_that_the_process_may_use() -> None:
    shape = local_shape(RaySettings())
    assert len(shape.nodes) == 1
    assert shape.cpus == len(os.sched_getaffinity(0))
    assert shape.gpus == torch.cuda.device_count()
    assert shape.cpu == local_cpu()


def test_what_ray_is_told_of_the_machine_counts() -> None:
    written = {"num_cpus": 7, "num_gpus": 0, "resources": {"fast_disk": 2}}
    shape = local_shape(RaySettings(ray_init_kwargs=written))
    memory = psutil.virtual_memory().total
    assert shape.nodes == (NodeShape(cpus=7, gpus=0, others={"memory": memory, "fast_disk": 2}),)
    assert shape.fits({"CPU": 2}) == 3
    assert shape.fits({"CPU": 1, "fast_disk": 1}) == 2
    assert shape.fits({"CPU": 1, "slow_disk": 1}) == 0
    assert shape.fits({"CPU": 2, "memory": memory / 2}) == 2, "Ray counts bytes of memory by this name"


def test_null_means_as_ray_would_count() -> None:
    nothing = {"num_cpus": None, "num_gpus": None, "resources": None}
    assert local_shape(RaySettings(ray_init_kwargs=nothing)) == local_shape(RaySettings())


@pytest.mark.parametrize(
    "written", [{"num_cpus": "many"}, {"num_cpus": [1]}, {"resources": ["fast_disk"]}, {"resources": {"a": "much"}}]
)
def test_what_is_no_amount_is_refused(written: dict[str, object]) -> None:
    with pytest.raises(Refused, match="ray_init_kwargs"):
        local_shape(RaySettings.model_validate({"ray_init_kwargs": written}))


# ---- which cluster --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "environment", "address"),
    [
        *((None, None, None), (None, "", None), (None, "10.0.0.1:6379", "10.0.0.1:6379")),
        *(("ray://head:10001", "10.0.0.1:6379", "ray://head:10001"), ("auto", None, "auto")),
    ],
)
def test_the_recipe_names_the_cluster_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, written: str | None, environment: str | None, address: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert cluster_address(RaySettings(ray_address=written)) == address


def test_a_node_offers_what_a_worker_can_ask_for() -> None:
    found = _node_shape(
        {"CPU": 4.0, "GPU": 1.0, "memory": 1e9, "object_store_memory": 1e8, "node:10.0.0.1": 1.0, "fast_disk": 2.0}
    )
    assert found == NodeShape(cpus=4, gpus=1, others={"memory": 1e9, "fast_disk": 2})
    assert _node_shape({"object_store_memory": 1e9}) == NodeShape(cpus=0, gpus=0, others={})


@pytest.mark.ray
def test_node_types_are_those_of_the_recipe_else_those_that_the_cluster_publishes(ray_address: str) -> None:
    key = b"__autoscaler_cluster_config"
    space = b"__autoscaler"
    group = _messages.NodeGroupConfig(resources={"CPU": 8, "GPU": 1}, max_count=3, name="gpu")
    endless = _messages.NodeGroupConfig(resources={"CPU": 2}, max_count=-1, name="cpu")
    published = _messages.ClusterConfig(node_group_configs=[group, endless])
    ray.init(ray_address, log_to_driver=False)
    try:
        assert node_types(RaySettings()) == ()
        internal_kv._internal_kv_put(key, published.SerializeToString(), namespace=space)
        found = node_types(RaySettings())
        written = RaySettings(ray_node_types={"own": {"resources": {"CPU": 1}, "max_workers": 2}})
        grown = joined_shape(written)
    finally:
        internal_kv._internal_kv_del(key, namespace=space)
        ray.shutdown()
    assert [(one.name, one.most) for one in found] == [("gpu", 3), ("cpu", 64)]
    assert found[0].shape == NodeShape(8, 1, {"memory": math.inf})
    assert [one.name for one in grown.node_types] == ["own"]
    assert [node.cpus for node in grown.nodes] == [4, 1, 1]


# ---- our code on its nodes ------------------------------------------------------------------------------------------


def test_our_code_travels_to_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    assert _runtime_env({}) == {"py_modules": OURS}
    assert all((Path(folder) / "__init__.py").is_file() for folder in OURS)


def test_what_the_recipe_says_of_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    written = {"runtime_env": {"env_vars": {"A": "b"}}}
    assert _runtime_env(written) == {"env_vars": {"A": "b"}, "py_modules": OURS}
    assert written == {"runtime_env": {"env_vars": {"A": "b"}}}, "the recipe's own mapping stays as it is"
    assert _runtime_env({"runtime_env": {"py_modules": ["mine"]}}) == {"py_modules": ["mine"]}
    assert _runtime_env({"runtime_env": {"py_modules": []}}) == {}, "the image has it"


@pytest.mark.parametrize(
    ("job", "brings"),
    [
        ({"runtime_env": {"py_modules": ["gcs://x.zip"], "working_dir": "gcs://y.zip"}, "metadata": {}}, True),
        ({"runtime_env": {"working_dir": "gcs://y.zip"}, "metadata": {}}, False),
        ({"runtime_env": {}, "metadata": {}}, False),
        ({"metadata": {}}, False),
    ],
)
def test_a_submitted_job_that_brought_our_code_is_not_sent_it_again(
    monkeypatch: pytest.MonkeyPatch, job: dict[str, object], brings: bool
) -> None:
    monkeypatch.setenv(JOB_CONFIG, json.dumps(job))
    assert ("py_modules" in _runtime_env({})) is not brings


def test_the_variable_of_a_job_is_the_one_that_ray_sets() -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert RAY_JOB_CONFIG_JSON_ENV_VAR == JOB_CONFIG


def test_an_address_where_nobody_listens_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunefleet.launch.cluster._KNOCKING_SECONDS", 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, so nobody else has it, and nobody listens
        port = closed.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
            with pytest.raises(Refused, match="No Ray cluster answers"), ray_session(RaySettings(ray_address=address)):
                pass


def test_what_is_no_address_is_told_as_that() -> None:
    nonsense = RaySettings(ray_address="nonsense")
    with pytest.raises(Refused, match="ray_address: nonsense is no address"), ray_session(nonsense):
        pass


def test_an_argument_that_ray_does_not_take_is_a_fault_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = RaySettings(ray_init_kwargs={"num_cups": 2})
    with pytest.raises(Refused, match=r"num_cups.*: correct ray_init_kwargs"), ray_session(settings):
        pass
