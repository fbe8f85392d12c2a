"""Rules between keys: both keys named, and a mend that runs."""

from __future__ import annotations

import pytest

from tunefleet.recipe.problems import RecipeError
from tunefleet.recipe.read import read_flat

BASE: dict[str, object] = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "outputs/first"}
HELD_OUT: dict[str, object] = {"val_size": 0.1, "eval_strategy": "steps"}


@pytest.mark.parametrize(
    ("keys", "named", "mended"),
    [
        ({"bf16": True, "fp16": True}, ("bf16", "fp16"), {"fp16": None}),
        ({"pure_bf16": True, "fp16": True}, ("pure_bf16", "fp16"), {"fp16": None}),
        ({"pure_bf16": True, "bf16": False}, ("pure_bf16", "bf16"), {"bf16": None}),
        ({"eval_strategy": "steps"}, ("eval_strategy", "val_size"), {"val_size": 0.1}),
        ({"do_eval": True}, ("do_eval", "eval_dataset"), {"eval_dataset": "held.jsonl"}),
        ({"val_size": 0.1, "eval_dataset": "x"}, ("val_size", "eval_dataset"), {"val_size": None}),
        (
            HELD_OUT | {"load_best_model_at_end": True, "save_strategy": "epoch"},
            ("load_best_model_at_end", "save_strategy"),
            {"eval_strategy": "epoch"},
        ),
        (
            {"val_size": 5, "load_best_model_at_end": True},
            ("load_best_model_at_end", "eval_strategy"),
            {"eval_strategy": "steps"},
        ),
        (
            HELD_OUT | {"load_best_model_at_end": True, "save_steps": 50, "eval_steps": 20},
            ("save_steps", "eval_steps"),
            {"save_steps": 40},
        ),
        (
            HELD_OUT | {"load_best_model_at_end": True, "save_steps": 25},
            ("save_steps", "logging_steps"),
            {"save_steps": 20},
        ),
        ({"stage": "pt", "neat_packing": True}, ("neat_packing", "stage"), {"neat_packing": None, "packing": True}),
        ({"stage": "pt", "train_on_prompt": True}, ("train_on_prompt", "stage"), {"stage": "sft"}),
        ({"stage": "pt", "mask_history": True}, ("mask_history", "stage"), {"mask_history": None}),
        ({"train_on_prompt": True, "mask_history": True}, ("train_on_prompt", "mask_history"), {"mask_history": None}),
        ({"neat_packing": True, "packing": False}, ("neat_packing", "packing"), {"packing": None}),
        ({"do_train": False}, ("do_train",), {"do_train": True}),
        ({"create_new_adapter": True}, ("create_new_adapter", "adapter_name_or_path"), {"adapter_name_or_path": "a"}),
        (
            {"gradient_checkpointing": True, "disable_gradient_checkpointing": True},
            ("gradient_checkpointing", "disable_gradient_checkpointing"),
            {"disable_gradient_checkpointing": None},
        ),
        ({"sharding": "fsdp2", "deepspeed": "z3.json"}, ("sharding", "deepspeed"), {"deepspeed": None}),
        ({"output_dir": ".."}, ("output_dir", "ray_run_name"), {"ray_run_name": "first"}),
    ],
)
def test_a_clash_names_both_keys_and_its_mend_runs(
    keys: dict[str, object], named: tuple[str, ...], mended: dict[str, object]
) -> None:
    with pytest.raises(RecipeError) as caught:
        read_flat(BASE | keys)
    assert len(caught.value.problems) == 1
    line = caught.value.problems[0].line()
    assert caught.value.problems[0].mend
    assert all(key in line for key in named)
    read_flat(BASE | keys | mended)


def test_load_best_alone_asks_for_rows_and_for_evaluations() -> None:
    with pytest.raises(RecipeError) as caught:
        read_flat(BASE | {"load_best_model_at_end": True})
    assert len(caught.value.problems) == 2


def test_a_rule_is_passed_over_where_a_key_is_wrong_in_itself() -> None:
    with pytest.raises(RecipeError) as caught:
        read_flat(BASE | {"bf16": "maybe", "fp16": True})
    assert [problem.key for problem in caught.value.problems] == ["bf16"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps: 5 wins over warmup_ratio: 0.1"),
        ({"max_steps": 5, "num_train_epochs": 2}, "max_steps: 5 wins over num_train_epochs: 2"),
        ({"eval_steps": 5}, "eval_steps: not used"),
        ({"save_steps": 5, "save_strategy": "epoch"}, "save_steps: not used"),
        ({"val_size": 0.1}, "sets rows aside and nothing evaluates them"),
        ({"stage": "pt", "template": "llama3"}, "template: llama3 is not used"),
        ({"disable_gradient_checkpointing": False}, "turns gradient checkpointing on"),
    ],
)
def test_what_may_have_been_meant_otherwise_is_a_notice(keys: dict[str, object], said: str) -> None:
    notices = read_flat(BASE | keys).notices
    assert len(notices) == 1
    assert said in notices[0]


def test_an_ordinary_recipe_has_no_notice() -> None:
    assert read_flat(BASE | {"max_steps": 5}).notices == ()
    assert read_flat(BASE | HELD_OUT | {"eval_steps": 5}).notices == ()
