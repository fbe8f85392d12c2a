"""Freeze tuning: exactly the chosen parts train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from tunefleet_strategies.contract import Precision
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.freeze import Freeze

Call = Callable[..., Any]

ROOTS = {"llama": "model.layers", "qwen2_tied": "model.layers", "gpt2": "transformer.h", "moe": "model.layers"}
ATTENTION = {"llama": "self_attn", "qwen2_tied": "self_attn", "gpt2": "attn", "moe": "self_attn"}


def freeze(**keys: object) -> Freeze:
    return Freeze.model_validate(keys)


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("count", "layers"), [(1, [2]), (2, [1, 2]), (9, [0, 1, 2]), (-1, [0]), (-2, [0, 1]), (-9, [0, 1, 2])]
)
def test_count_takes_the_last_or_the_first(
    architecture: str, build: Call, attach: Call, count: int, layers: list[int]
) -> None:
    model = attach(freeze(freeze_trainable_layers=count), build(architecture))
    root = ROOTS[architecture]
    expected = {name for name, _ in model.named_parameters() if any(name.startswith(f"{root}.{i}.") for i in layers)}
    assert trained(model) == expected


def test_ids_take_exactly_these(architecture: str, build: Call, attach: Call) -> None:
    model = attach(freeze(freeze_trainable_layer_ids=[2, 0]), build(architecture))
    assert not any(f"{ROOTS[architecture]}.1." in name for name in trained(model))
    assert any(f"{ROOTS[architecture]}.0." in name for name in trained(model))
    assert any(f"{ROOTS[architecture]}.2." in name for name in trained(model))


def test_modules_and_extra_modules(architecture: str, build: Call, attach: Call) -> None:
    extra = {"gpt2": "wte,ln_f"}.get(architecture, "embed_tokens,norm")
    settings = freeze(
        freeze_trainable_layers=1, freeze_trainable_modules=ATTENTION[architecture], freeze_extra_modules=extra
    )
    model = attach(settings, build(architecture))
    part = f"{ROOTS[architecture]}.2.{ATTENTION[architecture]}."
    outer = {"gpt2": ("transformer.wte.", "transformer.ln_f.")}.get(
        architecture, ("model.embed_tokens.", "model.norm.")
    )
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith((part, *outer))}


def test_nothing_frozen_moves(architecture: str, build: Call, attach: Call, train: Call) -> None:
    model = attach(freeze(freeze_trainable_layers=1), build(architecture))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(freeze(), model, steps=4)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(model)


def test_formats_and_export_in_one_format(
    build: Call, attach: Call, autocast: Precision, logits: Call, tmp_path: Path
) -> None:
    model = attach(freeze(), build("llama"), precision=autocast)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[2].mlp.up_proj.weight.dtype == torch.float32
    freeze().export(model, tmp_path, {})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(loaded), logits(model.float()))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"freeze_trainable_layers": 0}, "trains no layer"),
        ({"freeze_trainable_layers": None}, "no ids are given"),
        ({"freeze_trainable_layers": 2, "freeze_trainable_layer_ids": [1]}, "both choose layers"),
        ({"freeze_trainable_layer_ids": [-1]}, "count layers from 0"),
        ({"freeze_trainable_layer_ids": [1, 1]}, "stands twice"),
        ({"freeze_trainable_layer_ids": []}, "empty piece"),
        ({"freeze_trainable_modules": "all,mlp"}, "cannot stand beside"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        freeze(**keys)


@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("llama", {"freeze_trainable_layer_ids": [3]}, "3 is no layer of this model; choose from 0 to 2"),
        ("llama", {"freeze_trainable_modules": "self_atn"}, "did you mean `self_attn`"),
        ("llama", {"freeze_trainable_modules": "q_proj"}, "choose from all, self_attn, mlp"),
        ("llama", {"freeze_extra_modules": "mlp"}, "choose from embed_tokens, norm, lm_head"),
        ("qwen2_tied", {"freeze_extra_modules": "lm_head"}, "name `embed_tokens` instead"),
        ("gpt2", {"freeze_extra_modules": "lm_head"}, "name `wte` instead"),
    ],
)
def test_names_that_are_not_there_are_refused(
    name: str, keys: dict[str, Any], reason: str, build: Call, attach: Call
) -> None:
    with pytest.raises(StrategyError, match=reason):
        attach(freeze(**keys), build(name))


def test_ids_survive_a_round_trip_through_resolved_keys() -> None:
    settings = freeze(freeze_trainable_layer_ids=[1])
    assert settings.freeze_trainable_layers is None
    assert freeze(**settings.model_dump(mode="json")) == settings
