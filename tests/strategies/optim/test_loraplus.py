"""LoRA+: who learns at which rate (exactness.md D1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.lora import Lora

Call = Callable[..., Any]

SPEC = OptimizerSpec("adamw_torch", 1e-3, weight_decay=0.1)


def rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of every trainable parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


def lora(**keys: object) -> Lora:
    return Lora.model_validate({"lora_rank": 4, "loraplus_lr_ratio": 16, "loraplus_lr_embedding": 5e-6, **keys})


def test_each_kind_has_its_rate(build: Call, attach: Call) -> None:
    settings = lora(use_dora=True, lora_target="q_proj,up_proj,embed_tokens", additional_target="lm_head,norm")
    model = attach(settings, build("llama"))
    found = rates(model, settings.optimizer(model, SPEC))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in found.items():
        if ".lora_embedding_" in name:
            assert rate == (5e-6, 0.1), name
        elif ".lora_B." in name:
            assert rate == (16e-3, 0.1), name
        elif "magnitude" in name or ".norm." in name:
            assert rate == (1e-3, 0.0), name
        else:
            assert rate == (1e-3, 0.1), name


@pytest.mark.parametrize("keys", [{}, {"lora_target": "q_proj,embed_tokens"}])
def test_as_pefts_helper_where_it_is_right(keys: dict[str, Any], build: Call, attach: Call) -> None:
    settings = lora(**keys)
    model = attach(settings, build("llama"))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=5e-6, loraplus_weight_decay=0.1
    )
    assert rates(model, settings.optimizer(model, SPEC)) == rates(model, theirs)


def test_where_pefts_helper_is_not_right(build: Call, attach: Call) -> None:
    """It gives DoRA's magnitudes the high rate, as any vector."""
    settings = lora(use_dora=True)
    model = attach(settings, build("llama"))
    theirs = rates(model, create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16))
    ours = rates(model, settings.optimizer(model, SPEC))
    magnitudes = [name for name in ours if "magnitude" in name]
    assert magnitudes
    assert {theirs[name][0] for name in magnitudes} == {16e-3}
    assert {ours[name] for name in magnitudes} == {(1e-3, 0.0)}


def test_a_module_that_is_itself_named_like_a_factor(build: Call, attach: Call) -> None:
    """Factors are told by the module that holds them, not by a name in their path."""
    base = build("llama")
    base.add_module("my_lora_B_head", torch.nn.Linear(2, 3))
    settings = lora(additional_target="my_lora_B_head")
    model = attach(settings, base)
    found = rates(model, settings.optimizer(model, SPEC))
    (whole,) = [rate for name, rate in found.items() if "modules_to_save" in name and name.endswith(".weight")]
    assert whole == (1e-3, 0.1)


def test_off_means_one_rate(build: Call, attach: Call) -> None:
    settings = Lora(lora_rank=4)
    model = attach(settings, build("llama"))
    optimizer = settings.optimizer(model, SPEC)
    assert [group["name"] for group in optimizer.param_groups] == ["base"]


def test_experts_take_part(build: Call, attach: Call) -> None:
    settings = lora()
    model = attach(settings, build("moe"))
    found = rates(model, settings.optimizer(model, SPEC))
    assert {rate for name, rate in found.items() if ".experts." in name and ".lora_B." in name} == {(16e-3, 0.1)}
