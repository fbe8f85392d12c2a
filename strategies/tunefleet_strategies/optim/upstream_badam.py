"""The package badam's own optimizers behind our contract: `optimizer_backend: upstream`.

They are left as they are, so that a run shows what they do: the first block gets K - 1 updates, the decay of every
group is replaced by the one default (norms and biases included), ratio mode knows no decay at all and draws from the
global random state. What would train something else in silence, or fail half-way, is refused. Their state cannot be
saved whole: where the schedule stands is in none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tunefleet_strategies.contract import MethodOptimizer, OptimizerSpec
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.block_adamw import Block
from tunefleet_strategies.optim.groups import Group
from tunefleet_strategies.optim.ratio_adamw import refuse_several_workers

if TYPE_CHECKING:
    from tunefleet_strategies.badam import BAdam


def upstream_badam(
    settings: BAdam, model: nn.Module, groups: list[Group], blocks: Sequence[Block], spec: OptimizerSpec
) -> Optimizer:
    """Build the published optimizer that the settings ask for.

    Raises:
        StrategyError: there are several workers, or it cannot train this model.
    """
    refuse_several_workers()
    if settings.badam_mode == "ratio":
        return UpstreamRatio(settings, model, groups, spec)
    return UpstreamBlock(settings, model, groups, blocks, spec)


class _Upstream(MethodOptimizer):
    """Hands everything to a published optimizer; parameter groups are the same objects, so learning rates arrive."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner: Any = inner  # the package is untyped

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the published optimizer."""
        loss: float | None = self.inner.step() if closure is None else self.inner.step(closure)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What the published optimizer says of itself; not enough to go on from."""
        state: dict[str, Any] = self.inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused: blocks and windows would not fit the moments.

        Raises:
            StrategyError: always.
        """
        raise StrategyError("optimizer_backend: upstream cannot go on from a saved state; write native to resume")


class UpstreamBlock(_Upstream):
    """`badam.BlockOptimizer` around torch's fused AdamW, over our blocks (its own search knows `layers.` only)."""

    def __init__(
        self, settings: BAdam, model: nn.Module, groups: list[Group], blocks: Sequence[Block], spec: OptimizerSpec
    ) -> None:
        from badam import BlockOptimizer

        adamw = AdamW(
            groups, lr=spec.learning_rate, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
        )
        start = settings.badam_start_block
        if start is None and settings.badam_switch_mode == "fixed":
            start = 0  # without one it fails
        inner = BlockOptimizer(
            base_optimizer=adamw,
            named_parameters_list=list(model.named_parameters()),
            block_prefix_list=[list(block.parameters) for block in blocks],
            switch_block_every=settings.badam_switch_interval,
            start_block=start,
            switch_mode=settings.badam_switch_mode,
            verbose=settings.badam_verbose,
        )
        super().__init__(inner)


class UpstreamRatio(_Upstream):
    """`badam.BlockOptimizerRatio`. Its hooks make gradients sparse while the backward pass runs."""

    def __init__(self, settings: BAdam, model: nn.Module, groups: list[Group], spec: OptimizerSpec) -> None:
        from badam import BlockOptimizerRatio

        named = list(model.named_parameters())
        _refuse_unknown_ends(settings, [name for name, _ in named])
        inner = BlockOptimizerRatio(
            groups,
            named,
            update_ratio=settings.badam_update_ratio,
            verbose=settings.badam_verbose,
            switch_every=settings.badam_switch_interval,
            mask_mode=settings.badam_mask_mode,
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            include_embedding=settings.badam_include_embedding,
            include_lm_head=settings.badam_include_lm_head,
        )
        super().__init__(inner)

    def gradient_norm(self) -> Tensor:
        """Norm of what the masks leave of the gradient; parameters without any are passed over, as it does."""
        parameters: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad = None  # an engine's zeros for what the backward pass has not touched
        kept = [p.grad.coalesce().values().float() for p in parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(values) for values in kept]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        return norm


def _refuse_unknown_ends(settings: BAdam, names: Sequence[str]) -> None:
    """It freezes the first parameters named `embed` and `lm_head`, and fails where there are none.

    Raises:
        StrategyError: it would fail on this model.
    """
    for part, included in (("embed", settings.badam_include_embedding), ("lm_head", settings.badam_include_lm_head)):
        if not included and not any(part in name for name in names):
            raise StrategyError(
                f"optimizer_backend: upstream with badam_mode: ratio needs a parameter named {part}, which this model "
                "has not (or shares with another); write optimizer_backend: native"
            )
