"""The recipes that are shipped: each is read without a notice, and each trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.worker.alone import run_alone

from tunefleet.artifacts.metrics import read_metrics
from tunefleet.recipe.read import read_recipe

JOBS = Path(__file__).resolve().parents[2] / "jobs"
RECIPES = sorted(path for path in JOBS.glob("*.yaml") if not path.name.startswith(("runtime_env", "search_")))
PROMISED = {
    "pretrain": "full",
    "full_sft": "full",
    "full_sft_fsdp2": "full",
    "full_sft_zero3": "full",
    "freeze_sft": "freeze",
    "lora_sft": "lora",
    "loraplus_sft": "lora",
    "rslora_sft": "lora",
    "dora_sft": "lora",
    "pissa_sft": "lora",
    "galore_sft": "galore",
    "galore_layerwise_sft": "galore",
    "badam_layer_sft": "badam",
    "badam_ratio_sft": "badam",
}


@pytest.fixture
def group_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Ray gives a single worker too, and DeepSpeed asks for."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


by_name = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_there_is_a_recipe_for_each_method() -> None:
    assert PROMISED.keys() <= {path.stem for path in RECIPES}


@by_name
def test_recipe_is_read_without_a_notice(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.notices == ()
    assert recipe.method.name == PROMISED.get(path.stem, recipe.method.name)


@by_name
def test_recipe_stands_on_the_quickstart(path: Path) -> None:
    recipe = read_recipe(path)
    start = ".quickstart/init" if recipe.data.stage == "pt" else ".quickstart/base"
    assert recipe.model.model_name_or_path == start
    assert recipe.data.dataset_dir == ".quickstart/data"
    assert recipe.ray.ray_storage_path == ".quickstart/runs"


def test_no_two_recipes_share_a_run() -> None:
    names = [read_recipe(path).run_name for path in RECIPES]
    assert len(set(names)) == len(names)


@by_name
def test_recipe_trains_three_steps(
    path: Path, tmp_path: Path, quickstart_world: Path, tiny_model: Path, group_of_one: None
) -> None:
    recipe = read_recipe(
        path,
        [
            f"model_name_or_path={tiny_model}",
            f"dataset_dir={quickstart_world / 'data'}",
            f"ray_storage_path={tmp_path / 'runs'}",
            f"cache_dir={quickstart_world / 'cache'}",
            "ray_num_workers=1",
            "max_steps=3",
            "logging_steps=1",
            "save_strategy=no",
            "eval_strategy=no",
            "eval_on_start=false",
            "eval_dataset=null",
            "per_device_train_batch_size=2",
        ],
    )
    finished = run_alone(recipe, tmp_path)
    assert not finished.ending["stopped"]
    run = Path(finished.folder.root.uri)
    losses = [line["loss"] for line in read_metrics(run / "record" / "metrics.jsonl")]
    assert len(losses) == 3
    # Near the loss of guessing, ln(512) = 6.2: the model is random and has hardly moved.
    assert all(loss is not None and math.isfinite(loss) and 5.0 < loss < 7.5 for loss in losses)
    weights = {file.name for file in (run / "model").glob("*.safetensors")}
    assert weights == {"adapter_model.safetensors" if recipe.method.name == "lora" else "model.safetensors"}
