"""Which trials are warm, in whose place their host sits, and how a person is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.tune import PlacementGroupFactory
from rich.console import Console

from tunefleet.errors import Refused
from tunefleet.hardware import local_cpu
from tunefleet.launch.draft import draft
from tunefleet.launch.placement import scaling
from tunefleet.plan import Plan
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.tune import search_from
from tunefleet.search.hosts import forks_here, host_keys, host_of, refuse_all_cold
from tunefleet.search.live import plan_table
from tunefleet.search.opening import open_space
from tunefleet.search.trials import BranchPlan, Workshop
from tunefleet.search.warm.host import place_of
from tunefleet.shapes import ClusterShape, NodeShape
from tunefleet.storage import place

DRIVER = PlacementGroupFactory([{"CPU": 0.0, "trial_driver": 1.0}])
CLUSTER = ClusterShape(nodes=(NodeShape(cpus=4.0, gpus=0.0),), cpu=local_cpu())
RATIO = {"finetuning_type": "full", "use_badam": True, "badam_mode": "ratio"}


def planned(root: Path, model: Path, **keys: object) -> Plan:
    recipe = {
        "model_name_or_path": str(model),
        "dataset": "quickstart_train",
        "output_dir": "out",
        "resources_per_worker": {"CPU": 2},
        **keys,
    }
    return draft(read_flat(recipe), CLUSTER, root, with_data=False)


def test_a_host_sits_in_the_one_bundle_that_ray_train_would_ask_for(tmp_path: Path, tiny_model: Path) -> None:
    plan = planned(tmp_path, tiny_model, **RATIO, placement_strategy="SPREAD")
    group = place_of({"trial": "one", **host_keys(plan)}, DRIVER)
    assert group.bundles == [{"CPU": 2.0}] == scaling(plan).as_placement_group_factory().bundles
    assert not group.head_bundle_is_empty  # the host takes it whole, its GPU too
    assert group.strategy == "SPREAD"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"finetuning_type": "lora", "ray_num_workers": 2, "resources_per_worker": {"CPU": 1}}, "cold (2 workers)"),
        ({"finetuning_type": "full", "deepspeed": "zero2"}, "cold (sharding zero2)"),
    ],
)
def test_trials_of_several_workers_and_sharded_ones_have_a_drivers_seat(
    tmp_path: Path, tiny_model: Path, keys: dict[str, object], words: str
) -> None:
    plan = planned(tmp_path, tiny_model, **keys)
    assert host_keys(plan) == {}
    assert place_of({"trial": "one"}, DRIVER) is DRIVER
    assert host_of(plan, (plan.workers.count,)) == words


def test_a_branch_whose_points_differ_says_so(tmp_path: Path, tiny_model: Path) -> None:
    plan = planned(tmp_path, tiny_model, **RATIO)
    assert host_of(plan, (1,)) == "warm"
    assert host_of(plan, (1, 2)) == "warm on one worker, else cold"


def test_a_search_without_any_warm_trial_is_refused() -> None:
    refuse_all_cold([])
    refuse_all_cold(["warm", "cold (2 workers)"])
    with pytest.raises(Refused) as caught:
        refuse_all_cold(["cold (2 workers)", "cold (sharding zero2)", "cold (2 workers)"])
    assert str(caught.value) == (
        "tune.trial_host: warm is for trials of one worker without sharding, and no branch has any (cold (2 workers), "
        "cold (sharding zero2)): write ray_num_workers: 1 and no sharding, or remove trial_host."
    )


@pytest.mark.parametrize(
    ("written", "shared"),
    [({}, True), ({"env_vars": {"A": "1"}}, True), ({"pip": ["wandb"]}, False), ({"working_dir": "."}, False)],
)
def test_hosts_with_packages_of_their_own_start_their_own_server(
    tmp_path: Path, tiny_model: Path, written: dict[str, object], shared: bool
) -> None:
    plan = planned(tmp_path, tiny_model, **RATIO, ray_init_kwargs={"runtime_env": written} if written else {})
    assert forks_here(plan.recipe.ray, joins=False) is shared


def test_the_plan_says_which_branches_are_warm(tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> None:
    """Two workers are wished: LoRA has them and is cold, ratio mode has one and is warm."""
    keys: dict[str, object] = {
        "model_name_or_path": str(tiny_model),
        "dataset": "quickstart_train",
        "dataset_dir": str(quickstart_world / "data"),
        "cache_dir": str(quickstart_world / "cache"),
        "cutoff_len": 64,
        "output_dir": str(tmp_path / "out"),
        "ray_num_workers": 2,
        "resources_per_worker": {"CPU": 1},
        "val_size": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "max_steps": 10,
        "tune": {
            "trial_host": "warm",
            "space": [
                {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}},
                {**RATIO, "badam_switch_interval": {"choice": [5, 9]}},
            ],
        },
    }
    search = search_from(keys)
    shop = Workshop(open_space(search), search.tune, search.keys, CLUSTER, tmp_path, place(str(tmp_path / "search")))
    plans = shop.survey()
    assert [one.host for one in plans] == ["cold (2 workers)", "warm"]
    console = Console(record=True, width=200)
    console.print(plan_table(plans))
    assert "cold (2 workers)" in console.export_text()


def test_the_plan_of_a_search_without_hosts_says_nothing_of_them() -> None:
    assert all(column.header != "host" for column in plan_table(list[BranchPlan]()).columns)
