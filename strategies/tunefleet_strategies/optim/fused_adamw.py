"""torch's fused AdamW over loose tensors, for optimizers that keep their own books."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class Operands:
    """Tensors of equal shape, place by place: what changes, its gradient, its moments m and v. All fp32."""

    values: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)

    def append(self, value: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Add one place."""
        self.values.append(value)
        self.gradients.append(gradient)
        self.exp_avgs.append(exp_avg)
        self.exp_avg_sqs.append(exp_avg_sq)


def fused_adamw(
    operands: Operands, *, step: int, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Update values and moments in place (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), decay first.

    Args:
        step: number of this update, from 1; it corrects the bias of the moments.
    """
    if not operands.values:
        return
    # torch counts in a tensor for each parameter and raises it before it updates. These live for this call only.
    counters = torch.full((len(operands.values),), float(step - 1), device=operands.values[0].device).unbind()
    adamw(
        operands.values,
        operands.gradients,
        operands.exp_avgs,
        operands.exp_avg_sqs,
        [],
        list(counters),
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
