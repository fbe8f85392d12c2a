"""BAdam, layer mode: AdamW on one block of layers at a time (Luo et al., arXiv 2404.02827, algorithm 1).

Legend: a tensor of state has the shape of its parameter, whatever that is; N_b entries in the active block.

The active block, and it alone, requires gradients, so the backward pass ends below it. State, all fp32: moments m and v
(8 N_b bytes), and beside bf16 weights a master copy (4 N_b) that the weights are rounded from after every update. The
update is torch's AdamW (decay first, epsilon after the bias correction), unlike ratio mode and GaLore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.optim import AdamW

from tunefleet_strategies.contract import InTurns, OptimizerSpec
from tunefleet_strategies.optim.block_schedule import BlockSchedule
from tunefleet_strategies.optim.fused_adamw import Operands, fused_adamw
from tunefleet_strategies.optim.groups import Group
from tunefleet_strategies.optim.visits import VisitingAdamW


@dataclass(frozen=True)
class Block:
    """Parameters that train together."""

    label: str
    parameters: Mapping[str, nn.Parameter]


class BlockAdamW(VisitingAdamW, InTurns):
    """AdamW on the block that the schedule names. It narrows `requires_grad` to that block."""

    def __init__(
        self,
        groups: list[Group],
        blocks: Sequence[Block],
        schedule: BlockSchedule,
        spec: OptimizerSpec,
        *,
        verbose: int = 0,
    ) -> None:
        """
        Args:
            groups: every parameter of `blocks`, in groups of one learning rate and decay each.
        """
        self.blocks = tuple(blocks)
        self.schedule = schedule
        super().__init__(
            groups,
            {name: parameter for block in blocks for name, parameter in block.parameters.items()},
            spec,
            interval=schedule.interval,
            settings=asdict(schedule),
            verbose=verbose,
        )
        self._begin_visit()

    @property
    def active(self) -> Block:
        """The block that the next update trains."""
        return self.blocks[self.schedule.of_visit(self.visit)]

    def turn_optimizer(self) -> AdamW:
        """torch's AdamW over the active block: the same update, over whatever an engine puts in the block's place."""
        chosen = set(self.active.parameters.values())
        groups = [{**group, "params": [p for p in group["params"] if p in chosen]} for group in self.param_groups]
        return AdamW([group for group in groups if group["params"]], fused=True)

    def advance(self) -> bool:
        """Count an update that an engine has applied in place of `step`."""
        self._announce()
        return self._count()

    def stand_at(self, updates: int) -> None:
        """Make the block active that trains after so many updates; its state begins anew."""
        self.updates = updates
        self._unsaid.clear()
        self._begin_visit()

    def _activate(self) -> None:
        chosen = set(self.active.parameters.values())
        for block in self.blocks:
            for parameter in block.parameters.values():
                parameter.requires_grad_(parameter in chosen)
                if parameter not in chosen:
                    parameter.grad = None

    def _update(self, group: Group, step: int) -> None:
        chosen = set(self.active.parameters.values())
        active: list[nn.Parameter] = [parameter for parameter in group["params"] if parameter in chosen]
        operands = Operands()
        for parameter in active:
            state = self._moments(parameter, parameter.detach)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # untouched = zero
            master = state.get("master", parameter.detach())
            operands.append(master, gradient.float(), state["exp_avg"], state["exp_avg_sq"])
        fused_adamw(
            operands,
            step=step,
            learning_rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        for parameter, master in zip(active, operands.values, strict=True):
            if parameter.dtype != torch.float32:
                parameter.copy_(master)  # rounded to nearest

    def _about_visit(self) -> str:
        number = self.schedule.of_visit(self.visit)
        text = f"badam trains block {number} ({self.active.label}) of {len(self.blocks)}"
        if self.verbose > 1:
            text += f": {', '.join(self.active.parameters)}"
        visit = self.visit
        if self.schedule.mode == "random" and visit % len(self.blocks) == 0:
            order = self.schedule.order(visit // len(self.blocks))
            text += f"; the order of this round is {', '.join(str(block) for block in order)}"
        return text
