"""One decay rule for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora
from tunefleet_strategies.optim.groups import decays, grouped, is_norm, trainable

Call = Callable[..., Any]

SPEC = OptimizerSpec("adamw_torch", 1e-3, weight_decay=0.1)


def test_norms_and_biases_are_never_decayed(architecture: str, build: Call, attach: Call) -> None:
    model = attach(Full(), build(architecture))
    for owned in trainable(model):
        piece = owned.path.split(".")[-2]
        is_vector = owned.parameter.ndim == 1
        assert decays(owned) is not is_vector, owned.path
        assert is_norm(owned.module) == ("norm" in piece or piece.startswith("ln_")), owned.path


def test_a_norm_is_told_by_its_class_and_a_bias_by_its_attribute() -> None:
    class WideNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.ones(2, 3, 4))
            self.up_proj_bias = nn.Parameter(torch.ones(2, 3))

    model = nn.ModuleDict({"a_norm_in_name_only": nn.Linear(3, 4), "wide": WideNorm(), "experts": Experts()})
    assert {owned.path: decays(owned) for owned in trainable(model)} == {
        "a_norm_in_name_only.weight": True,
        "a_norm_in_name_only.bias": False,
        "wide.weight": False,
        "experts.up_proj": True,
        "experts.up_proj_bias": False,
    }


def test_groups_cover_each_parameter_once_in_order(architecture: str, build: Call, attach: Call) -> None:
    model = attach(Full(), build(architecture))
    groups = grouped(trainable(model), SPEC)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("base", 0.1), ("base_nodecay", 0.0)]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    position = {id(p): i for i, p in enumerate(model.parameters())}
    for group in groups:
        order = [position[id(p)] for p in group["params"]]
        assert order == sorted(order)


def test_magnitudes_are_not_decayed_and_factors_are(build: Call, attach: Call) -> None:
    model = attach(Lora(lora_rank=4, use_dora=True), build("llama"))
    for owned in trainable(model):
        assert decays(owned) is ("magnitude" not in owned.path)


def test_nothing_to_train_is_refused(build: Call) -> None:
    with pytest.raises(StrategyError, match="no parameter of the model is trainable"):
        grouped(trainable(build("llama").requires_grad_(False)), SPEC)
