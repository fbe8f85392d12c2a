"""What a plan is drafted from: token rows, and the shape of a model whose weights are not read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.training.deepspeed_files import FILES

from tunefleet.continuation import differences, mathematics
from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.launch.draft import data_shape, draft, tokenised
from tunefleet.models import load_model
from tunefleet.plan import Plan
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import Recipe
from tunefleet.shapes import ClusterShape, NodeShape
from tunefleet_strategies.contract import AttachContext, Precision
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.block_schedule import BlockSchedule

LAPTOP = ClusterShape((NodeShape(cpus=2),), cpu=Hardware("cpu", bf16=False))
FP32 = Precision(torch.float32, torch.float32, torch.float32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token cache for the tests that do not ask whether it is there."""
    return tmp_path_factory.mktemp("cache")


def recipe(world: Path, cache: Path, **keys: object) -> Recipe:
    base: dict[str, object] = {
        "model_name_or_path": str(world / "init"),
        "dataset": "quickstart_train",
        "dataset_dir": str(world / "data"),
        "output_dir": "outputs/first",
        "cache_dir": str(cache),
        "cutoff_len": 128,
        "preprocessing_num_workers": 1,
    }
    return read_flat(base | keys)


def rows(world: Path, name: str = "train") -> list[dict[str, str]]:
    return [json.loads(line) for line in (world / "data" / f"{name}.jsonl").read_text().splitlines()]


def only_shape(folder: Path, model: Path) -> Path:
    """A model's folder without its weights."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize(
    "method",
    [
        *({"finetuning_type": "full"}, {"finetuning_type": "freeze", "freeze_trainable_layers": 1}),
        *(
            {"finetuning_type": "lora", "lora_rank": 4},
            {"use_dora": True},
            {"pissa_init": True, "lora_target": "q_proj"},
        ),
    ],
)
def test_the_counts_are_those_of_the_loaded_model(
    quickstart_world: Path, cache: Path, method: dict[str, object]
) -> None:
    read = recipe(quickstart_world, cache, **method)
    plan = draft(read, LAPTOP, Path("/work"), with_data=False)
    model = read.method.attach(load_model(read.model), AttachContext(precision=FP32))
    assert plan.model.parameters == sum(p.numel() for p in model.parameters())
    assert plan.model.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.model.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan.model.architecture == "LlamaForCausalLM"


def test_no_weights_are_needed(quickstart_world: Path, tmp_path: Path) -> None:
    folder = only_shape(tmp_path / "shape", quickstart_world / "init")
    read = recipe(quickstart_world, tmp_path / "cache", model_name_or_path=str(folder))
    with pytest.raises(Refused):
        load_model(read.model)
    assert draft(read, LAPTOP, tmp_path).model == draft(recipe(quickstart_world, tmp_path), LAPTOP, tmp_path).model


def test_without_data_nothing_is_tokenised_and_updates_are_unknown(quickstart_world: Path, tmp_path: Path) -> None:
    plan = draft(recipe(quickstart_world, tmp_path / "cache"), LAPTOP, tmp_path, with_data=False)
    assert plan.data is None
    assert plan.batch.updates is None
    assert plan.batch.updates_per_epoch is None
    assert not (tmp_path / "cache").exists()
    steps = draft(recipe(quickstart_world, tmp_path / "cache", max_steps=3), LAPTOP, tmp_path, with_data=False)
    assert steps.batch.updates == 3


def test_with_data_every_number_is_known_and_told_on_the_way(quickstart_world: Path, tmp_path: Path) -> None:
    told: list[str] = []
    read = recipe(quickstart_world, tmp_path, num_train_epochs=2, eval_dataset="quickstart_heldout", do_eval=True)
    plan = draft(read, LAPTOP, Path("/work"), stages=lambda *stage: told.append(stage[0]))
    count = len(rows(quickstart_world))
    assert plan.data is not None
    assert plan.data.train_rows == count
    assert plan.data.evaluation_rows == len(rows(quickstart_world, "heldout"))
    assert plan.batch.updates == 2 * -(-count // 8)
    assert 0 < plan.data.train_target_tokens < plan.data.train_tokens
    assert plan.data.bad_rows == 0
    assert plan.place.root == "/work"
    assert "tokenise training" in told


def test_the_cache_gives_the_same_plan_again(quickstart_world: Path, tmp_path: Path) -> None:
    read = recipe(quickstart_world, tmp_path)
    first = draft(read, LAPTOP, tmp_path)
    assert not tokenised(read).built
    assert draft(read, LAPTOP, tmp_path) == first


def test_rows_that_nothing_evaluates_are_not_counted(quickstart_world: Path, cache: Path) -> None:
    plan = draft(recipe(quickstart_world, cache, val_size=5), LAPTOP, cache)
    assert plan.data is not None
    assert plan.data.train_rows == len(rows(quickstart_world)) - 5
    assert plan.data.evaluation_rows is None


def other_rows(folder: Path, *lines: object) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_rows_that_are_not_used_are_counted_and_shown(quickstart_world: Path, tmp_path: Path) -> None:
    good = {"instruction": "What is json?", "input": "", "output": "It is a module."}
    bad = good | {"output": 3}
    file = other_rows(tmp_path / "rows", good, bad, good | {"output": "It is [/] two."}, *[bad] * 6)
    plan = draft(recipe(quickstart_world, tmp_path, dataset=str(file)), LAPTOP, tmp_path)
    assert plan.data is not None
    assert (plan.data.train_rows, plan.data.bad_rows) == (2, 7)
    said = [notice for notice in plan.notices if "not used" in notice]
    assert len(said) == 1
    assert said[0].startswith("7 rows are not used (")
    assert "row 2: " in said[0]
    assert said[0].endswith("; ...).")


def test_data_that_teach_nothing_are_refused(quickstart_world: Path, tmp_path: Path) -> None:
    prepared = tokenised(recipe(quickstart_world, tmp_path))
    with pytest.raises(Refused, match="tunefleet data"):
        data_shape(replace(prepared, train=None))


def refused_before_tokens(read: Recipe, cluster: ClusterShape, cache: Path) -> str:
    with pytest.raises((Refused, StrategyError)) as caught:
        draft(read, cluster, cache.parent)
    assert not cache.exists(), "nothing was tokenised"
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        *(({"ray_num_workers": 3}, "ray_num_workers: 3"), ({"lora_target": "nothing_like_this"}, "nothing_like_this")),
        *(
            ({"fp16": True}, "fp16"),
            ({"deepspeed": "ds.json"}, "deepspeed"),
            ({"model_name_or_path": "./nowhere"}, "./nowhere is no folder"),
        ),
    ],
)
def test_what_cannot_run_is_refused_before_a_long_tokenisation(
    quickstart_world: Path, tmp_path: Path, keys: dict[str, object], said: str
) -> None:
    cache = tmp_path / "cache"
    assert said in refused_before_tokens(recipe(quickstart_world, cache, **keys), LAPTOP, cache)


def test_what_deepspeed_does_not_know_is_refused_before_a_long_tokenisation(
    quickstart_world: Path, tmp_path: Path
) -> None:
    cache, config = tmp_path / "cache", {"zero_optimization": {"stage": 2, "overlap_com": True}}
    said = refused_before_tokens(recipe(quickstart_world, cache, deepspeed=config), LAPTOP, cache)
    assert "overlap_com is no key that DeepSpeed knows" in said


def test_a_folder_without_a_model_is_refused(quickstart_world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    read = recipe(quickstart_world, tmp_path / "cache", model_name_or_path=str(tmp_path / "empty"))
    assert "holds no config.json" in refused_before_tokens(read, LAPTOP, tmp_path / "cache")


def notices(plan: Plan, word: str) -> list[str]:
    return [notice for notice in plan.notices if word in notice]


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
def test_weights_without_a_master_copy_are_warned_of(quickstart_world: Path, cache: Path, method: str) -> None:
    pure = recipe(quickstart_world, cache, finetuning_type=method, pure_bf16=True)
    mixed = recipe(quickstart_world, cache, finetuning_type=method, bf16=True)
    assert len(notices(draft(pure, LAPTOP, cache, with_data=False), "without an fp32 copy")) == 1
    assert notices(draft(mixed, LAPTOP, cache, with_data=False), "without an fp32 copy") == []


def test_notices_of_the_method_stand_once_in_the_plan(quickstart_world: Path, cache: Path) -> None:
    read = recipe(quickstart_world, cache, pissa_init=True, lora_dropout=0.1)
    assert len(notices(draft(read, LAPTOP, cache), "pissa_init with lora_dropout")) == 1


def test_the_plan_names_the_blocks_that_the_run_will_not_train(quickstart_world: Path, cache: Path) -> None:
    """Two layers, one visit: the seed of the run decides which one it is."""
    keys: dict[str, object] = {"finetuning_type": "full", "use_badam": True, "badam_switch_mode": "random"}
    told = set()
    for seed in range(6):
        read = recipe(quickstart_world, cache, **keys, seed=seed, max_steps=10)
        first = BlockSchedule(2, 50, "random", seed=seed).block(0)
        (text,) = notices(draft(read, LAPTOP, cache, with_data=False), "never train")
        assert f"never train model.layers.{1 - first} in 10 updates" in text
        told.add(first)
    assert told == {0, 1}


def test_a_deepspeed_file_travels_as_its_content(quickstart_world: Path, tmp_path: Path) -> None:
    """A worker never needs the file; the same content under another name is the same run, another content is not."""
    content = FILES["ds_z3_config"]
    for name, written in (("a", content), ("b", content), ("c", content | {"communication_data_type": "bf16"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(written))
    plans = {
        value: draft(recipe(quickstart_world, tmp_path / "cache", deepspeed=value), LAPTOP, tmp_path, with_data=False)
        for value in ("a.json", "b.json", "c.json", "zero3")
    }
    first = plans["a.json"]
    assert first.sharding == "zero3"
    assert first.recipe.training.deepspeed == content
    again = Plan.model_validate_json(first.model_dump_json())
    assert again.deepspeed == first.deepspeed
    assert differences(mathematics(first), mathematics(plans["b.json"])) == []
    changed = differences(mathematics(first), mathematics(plans["c.json"]))
    assert changed == ["deepspeed.communication_data_type: 'fp32' -> 'bf16'"], "the block that changed, not all of them"
    assert plans["zero3"].sharding == "zero3"
