"""Estimated bytes against counted ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from galore_torch.galore_projector import GaLoreProjector
from tests.storages import live_bytes
from transformers import PreTrainedModel

from tunefleet_strategies.contract import ModelShape, OptimizerSpec, ParameterShape, Precision, Strategy
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.lora import Lora
from tunefleet_strategies.optim.projection import Projection
from tunefleet_strategies.targets import anatomy

Call = Callable[..., Any]

METHODS = {
    "full": Full(),
    "freeze": Freeze(freeze_trainable_layers=1),
    "lora": Lora(lora_rank=4),
    "dora_additional": Lora(lora_rank=4, use_dora=True, additional_target=("norm",)),
    "pissa": Lora(lora_rank=4, pissa_init=True),
    **{f"galore_{kind}": GaLore(galore_rank=4, galore_proj_type=kind) for kind in get_args(Projection)},
    "galore_names": GaLore(galore_rank=40, galore_target=("mlp",)),
    "galore_upstream": GaLore(galore_rank=4, optimizer_backend="upstream"),
    "galore_upstream_full": GaLore(galore_rank=4, galore_proj_type="full", optimizer_backend="upstream"),
}


def shape_of(model: torch.nn.Module) -> ModelShape:
    parameters = tuple(ParameterShape(n, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters())
    parts = anatomy(model) if isinstance(model, PreTrainedModel) else None
    return ModelShape("tiny", 64, 32, 3, parameters, parts)


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
    assert live_bytes(list(model.parameters())) == estimate.weights
    with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert live_bytes([p.grad for p in model.parameters() if p.grad is not None]) == estimate.gradients
    optimizer.step()
    state = [tensor for entry in optimizer.state.values() for value in entry.values() for tensor in tensors_of(value)]
    assert live_bytes(state) == estimate.optimizer_state


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors of one entry of an optimizer's state; galore-torch keeps some in an object of its own."""
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, GaLoreProjector):
        return []
    matrix = value.ortho_matrix
    return list(matrix) if isinstance(matrix, list) else [matrix]


def test_layerwise_keeps_one_gradient_alone(
    architecture: str, build: Call, attach: Call, tokens: torch.Tensor, fp32: Precision
) -> None:
    method = GaLore(galore_rank=4, galore_layerwise=True)
    estimate = method.footprint(shape_of(attach(method, build(architecture, meta=True))), fp32)
    model = attach(method, build(architecture))
    optimizer = method.optimizer(model, OptimizerSpec("adamw_torch", 1e-3))
    most: list[int] = []

    def count(parameter: torch.Tensor) -> None:
        most.append(live_bytes([p.grad for p in model.parameters() if p.grad is not None]))

    for parameter in model.parameters():  # after the optimizer's own hooks, before which one gradient lived
        parameter.register_post_accumulate_grad_hook(count)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert max(most) == 0
    assert estimate.gradients == 4 * max(p.numel() for p in model.parameters())
    state = [tensor for entry in optimizer.state.values() for value in entry.values() for tensor in tensors_of(value)]
    assert live_bytes(state) == estimate.optimizer_state


def test_by_hand(fp32: Precision) -> None:
    """Full fp32 tuning of N entries in one matrix: 4 N, 4 N, 8 N and one step counter."""
    shape = ModelShape("one", 1, 1, 1, (ParameterShape("w", (10, 20), True), ParameterShape("f", (5,), False)))
    footprint = Full().footprint(shape, fp32)
    assert (footprint.weights, footprint.gradients, footprint.optimizer_state) == (800 + 20, 800, 1600 + 4)
