"""Optimizers built from groups, and their state on disk."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from tunefleet_strategies.contract import OptimizerSpec, Strategy
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora

Call = Callable[..., Any]

METHODS = {
    "full": Full(),
    "freeze": Freeze(),
    "lora": Lora(lora_rank=4),
    "loraplus": Lora(lora_rank=4, loraplus_lr_ratio=16.0, use_dora=True, additional_target=("lm_head",)),
}


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_recipes_numbers_reach_the_optimizer(name: Any, build: Call, attach: Call) -> None:
    model = attach(Full(), build("llama"))
    optimizer = Full().optimizer(model, OptimizerSpec(name, 2e-3, (0.8, 0.95), 1e-6, 0.1))
    assert isinstance(optimizer, SGD if name == "sgd" else AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3}
    if name != "sgd":
        assert optimizer.defaults["fused"] is True
        assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_state_loads_as_plain_tensors_and_continues_bit_by_bit(
    method: Strategy, build: Call, attach: Call, tokens: torch.Tensor
) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    spec = OptimizerSpec("adamw_torch", 1e-2, weight_decay=0.1)
    model = attach(method, build("llama"))
    optimizer = method.optimizer(model, spec)
    for _ in range(2):
        step(model, optimizer)
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": model.state_dict()}, buffer)
    step(model, optimizer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    again = attach(method, build("llama"))
    again.load_state_dict(stored["weights"])
    resumed = method.optimizer(again, spec)
    resumed.load_state_dict(stored["optimizer"])
    step(again, resumed)
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
