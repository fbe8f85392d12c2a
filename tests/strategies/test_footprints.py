"""Estimated bytes against counted ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tunefleet_strategies.contract import ModelShape, OptimizerSpec, ParameterShape, Precision, Strategy
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora

Call = Callable[..., Any]

METHODS = {
    "full": Full(),
    "freeze": Freeze(freeze_trainable_layers=1),
    "lora": Lora(lora_rank=4),
    "dora_additional": Lora(lora_rank=4, use_dora=True, additional_target=("norm",)),
    "pissa": Lora(lora_rank=4, pissa_init=True),
}


def live(tensors: list[torch.Tensor]) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def shape_of(model: torch.nn.Module) -> ModelShape:
    parameters = tuple(ParameterShape(n, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters())
    return ModelShape("tiny", 64, 32, 3, parameters)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("formats", ["fp32", "autocast", "pure_bf16"])
def test_estimate_is_what_lives(
    method: Strategy,
    formats: str,
    architecture: str,
    build: Call,
    attach: Call,
    tokens: torch.Tensor,
    request: pytest.FixtureRequest,
) -> None:
    if isinstance(method, Lora) and method.additional_target and architecture == "gpt2":
        method = method.model_copy(update={"additional_target": ("ln_f",)})
    precision = request.getfixturevalue(formats)
    estimate = method.footprint(
        shape_of(attach(method, build(architecture, meta=True), precision=precision)), precision
    )
    model = attach(method, build(architecture), precision=precision)
    optimizer = method.optimizer(model, OptimizerSpec("adamw_torch", 1e-3))
    assert live(list(model.parameters())) == estimate.weights
    with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert live([p.grad for p in model.parameters() if p.grad is not None]) == estimate.gradients
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert live(state) == estimate.optimizer_state


def test_by_hand(fp32: Precision) -> None:
    """Full fp32 tuning of N entries in one matrix: 4 N, 4 N, 8 N and one step counter."""
    shape = ModelShape("one", 1, 1, 1, (ParameterShape("w", (10, 20), True), ParameterShape("f", (5,), False)))
    footprint = Full().footprint(shape, fp32)
    assert (footprint.weights, footprint.gradients, footprint.optimizer_state) == (800 + 20, 800, 1600 + 4)
