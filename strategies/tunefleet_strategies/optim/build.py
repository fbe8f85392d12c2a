"""From an `OptimizerSpec` and parameter groups to a torch optimizer."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.groups import Group, grouped, trainable


def build(groups: list[Group], spec: OptimizerSpec) -> Optimizer:
    """Build the optimizer that a recipe names over ready-made groups.

    Both AdamW names of torch mean its fused kernel, on CPU as on GPU: the same update in one pass over memory.

    Raises:
        StrategyError: an optimizer of the upstream packages, which no method uses on ready-made groups.
    """
    if spec.name == "adamw_8bit":
        raise StrategyError("optim: adamw_8bit is an optimizer of the upstream packages; write optim: adamw_torch")
    if spec.name == "sgd":
        return SGD(groups, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    return AdamW(
        groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )


def optimizer_over(model: nn.Module, spec: OptimizerSpec) -> Optimizer:
    """The optimizer over everything that trains, at one learning rate, with the common decay rule."""
    return build(grouped(trainable(model), spec), spec)
