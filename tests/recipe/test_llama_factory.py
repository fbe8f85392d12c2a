"""The recipes that LLaMA-Factory ships for text `pt` and `sft` are read unchanged.

The keys and values of its examples, by what they share; only the interface is repeated here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tunefleet.recipe.problems import RecipeError
from tunefleet.recipe.read import read_flat, read_recipe
from tunefleet.recipe.schema import recipe_schema
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.lora import Lora

Keys = dict[str, object]

LLAMA3: Keys = {"model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct"}
QWEN3: Keys = {"model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507", "trust_remote_code": True}
LORA: Keys = {"do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
FULL: Keys = {"do_train": True, "finetuning_type": "full"}
ROWS: Keys = {
    "dataset": "identity,alpaca_en_demo",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
}
QWEN_ROWS: Keys = {
    "dataset": "identity,alpaca_en_demo",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
}
TEXT: Keys = {"stage": "pt", "dataset": "c4_demo", "cutoff_len": 2048, "max_samples": 1000}
OUTPUT: Keys = {
    "output_dir": "saves/llama3-8b/lora/sft",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
}
NEW_OUTPUT: Keys = OUTPUT | {"save_only_model": False, "report_to": "none"}
TRAIN: Keys = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
}
MIXED: Keys = TRAIN | {"bf16": True, "ddp_timeout": 180000000}
NEW_TRAIN: Keys = MIXED | {"resume_from_checkpoint": None}
EVAL: Keys = {"val_size": 0.1, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500}
Z3: Keys = {"deepspeed": "examples/deepspeed/ds_z3_config.json"}

READ: dict[str, Keys] = {
    "train_lora/llama3_lora_pretrain": LLAMA3 | LORA | TEXT | OUTPUT | MIXED | {"overwrite_cache": True},
    "train_lora/qwen3_lora_pretrain": QWEN3 | LORA | TEXT | NEW_OUTPUT | NEW_TRAIN | {"dataloader_num_workers": 4},
    "train_lora/llama3_lora_sft": LLAMA3
    | LORA
    | {"stage": "sft"}
    | ROWS
    | OUTPUT
    | MIXED
    | {"trust_remote_code": True},
    "train_lora/qwen3_lora_sft": QWEN3 | LORA | {"stage": "sft"} | QWEN_ROWS | NEW_OUTPUT | NEW_TRAIN,
    "train_lora/llama3_lora_sft_ds3": LLAMA3 | LORA | {"stage": "sft"} | Z3 | ROWS | OUTPUT | MIXED | EVAL,
    "train_lora/qwen3_lora_sft_ds3": QWEN3 | LORA | {"stage": "sft"} | Z3 | QWEN_ROWS | NEW_OUTPUT | NEW_TRAIN,
    "train_lora/llama3_lora_sft_ray": LLAMA3
    | LORA
    | {"stage": "sft", "dataset_dir": "REMOTE:llamafactory/demo_data"}
    | ROWS
    | NEW_OUTPUT
    | NEW_TRAIN
    | {"output_dir": "tmp_dir", "ray_run_name": "llama3_8b_sft_lora", "ray_storage_path": "./saves"}
    | {"ray_num_workers": 4, "placement_strategy": "PACK", "resources_per_worker": {"GPU": 1}},
    "train_lora/qwen3_lora_sft_ray": QWEN3
    | LORA
    | {"stage": "sft", "dataset_dir": "REMOTE:llamafactory/demo_data"}
    | QWEN_ROWS
    | NEW_OUTPUT
    | NEW_TRAIN
    | {"output_dir": "tmp_dir", "ray_num_workers": 4},
    "train_lora/llama3_preprocess": LLAMA3
    | {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all"}
    | ROWS
    | {"tokenized_path": "saves/llama3-8b/dataset/sft", "output_dir": "saves/x", "overwrite_output_dir": True},
    "train_full/llama3_full_sft": LLAMA3
    | FULL
    | {"stage": "sft", "trust_remote_code": True}
    | Z3
    | ROWS
    | OUTPUT
    | MIXED
    | {"gradient_accumulation_steps": 2, "learning_rate": 1.0e-5},
    "train_full/qwen3_full_sft": QWEN3 | FULL | {"stage": "sft"} | Z3 | QWEN_ROWS | NEW_OUTPUT | NEW_TRAIN,
    "extras/loraplus/llama3_lora_sft": LLAMA3 | LORA | {"loraplus_lr_ratio": 16.0} | ROWS | OUTPUT | MIXED | EVAL,
    "extras/pissa/llama3_lora_sft": LLAMA3
    | LORA
    | {"stage": "sft", "pissa_init": True, "pissa_iter": 16, "pissa_convert": True}
    | ROWS
    | NEW_OUTPUT
    | MIXED,
}
GALORE: Keys = {
    "use_galore": True,
    "galore_layerwise": True,
    "galore_target": "all",
    "galore_rank": 128,
    "galore_scale": 2.0,
    "pure_bf16": True,
    "gradient_accumulation_steps": 1,
}
BADAM: Keys = {
    "use_badam": True,
    "badam_mode": "layer",
    "badam_switch_mode": "ascending",
    "badam_switch_interval": 50,
    "badam_verbose": 2,
}
READ |= {
    "extras/galore/llama3_full_sft": LLAMA3 | FULL | ROWS | NEW_OUTPUT | TRAIN | GALORE,
    "extras/galore with names": LLAMA3 | FULL | ROWS | TRAIN | OUTPUT | EVAL | GALORE | {"galore_target": "mlp"},
}
READ |= {
    "extras/badam/llama3_full_sft": LLAMA3 | FULL | ROWS | OUTPUT | TRAIN | BADAM | EVAL,
    "extras/badam with ZeRO-3": LLAMA3 | FULL | ROWS | OUTPUT | TRAIN | BADAM | Z3,
}


@pytest.mark.parametrize("name", sorted(READ))
def test_an_example_is_read_unchanged(name: str, tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(READ[name]), encoding="utf-8")
    recipe = read_recipe(path)
    flat = recipe.flat()
    assert recipe.written == {key for key, value in READ[name].items() if value is not None}
    listed = {"dataset", "report_to", "lora_target", "galore_target"}
    for key in recipe.written - listed:
        assert flat[key] == READ[name][key]
    assert recipe.data.dataset == tuple(str(READ[name]["dataset"]).split(","))
    assert recipe.notices == ()
    assert read_flat(flat) == recipe
    assert Draft202012Validator(recipe_schema()).is_valid(READ[name])


def test_the_llama_pro_example_has_that_one_problem() -> None:
    method: Keys = {"finetuning_type": "freeze", "freeze_trainable_layers": 8, "freeze_trainable_modules": "all"}
    with pytest.raises(RecipeError) as caught:
        read_flat(LLAMA3 | method | {"use_llama_pro": True, "fp16": True} | ROWS | OUTPUT | TRAIN | EVAL)
    assert [problem.key for problem in caught.value.problems] == ["use_llama_pro"]


def test_galore_reaches_its_method() -> None:
    method = read_flat(READ["extras/galore/llama3_full_sft"]).method
    assert isinstance(method, GaLore)
    assert (method.galore_rank, method.galore_scale, method.galore_layerwise) == (128, 2.0, True)


def test_loraplus_reaches_its_method() -> None:
    method = read_flat(READ["extras/loraplus/llama3_lora_sft"]).method
    assert isinstance(method, Lora)
    assert method.loraplus_lr_ratio == 16.0
