"""galore-torch's own optimizers, for whoever wants the published code itself: `optimizer_backend: upstream`.

Its state holds Python objects and cannot be saved. The package is imported where it is used, because importing it
imports bitsandbytes, whether the 8-bit optimizer is wanted or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.groups import Group
from tunefleet_strategies.optim.projection import Projection

_NATIVE = "write optimizer_backend: native"


def check_upstream(projection: Projection, rank: int, projected: Mapping[str, Tensor]) -> None:
    """Refuse what is known to fail in the middle of a run.

    Raises:
        StrategyError: a package is missing, or `reverse_std` meets a wide matrix at its full rank.
    """
    missing = [package for package in ("galore_torch", "bitsandbytes") if find_spec(package) is None]
    if missing:
        raise StrategyError(f"optimizer_backend: upstream needs {missing[0]}, which is not installed; {_NATIVE}")
    if projection != "reverse_std":
        return
    for path, parameter in projected.items():
        rows, columns = parameter.shape
        if rank >= rows and rows < columns:
            raise StrategyError(
                f"galore_proj_type: reverse_std fails in galore-torch for {path} ({rows} x {columns}) at galore_rank "
                f"{rank}; {_NATIVE}, or galore_rank: {rows - 1}"
            )


def upstream_optimizer(groups: Sequence[Group], spec: OptimizerSpec) -> Optimizer:
    """galore-torch's AdamW, or its 8-bit one, over groups in this project's form.

    Raises:
        StrategyError: the 8-bit one needs a device that the model is not on.
    """
    if spec.name == "adamw_8bit":
        device = groups[0]["params"][0].device
        if device.type != "cuda" or not torch.cuda.is_available():
            raise StrategyError(
                f"optim: adamw_8bit runs on a CUDA device and the model is on {device.type}; write optim: adamw_torch"
            )
        return eight_bit(groups, spec)
    from galore_torch import GaLoreAdamW

    optimizer: Optimizer = GaLoreAdamW(
        [_translated(group) for group in groups],
        lr=spec.learning_rate,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        no_deprecation_warning=True,
    )
    return optimizer


def eight_bit(groups: Sequence[Group], spec: OptimizerSpec) -> Optimizer:
    """galore-torch's 8-bit AdamW, with the settings that its authors mean. Its steps wait for a CUDA device."""
    from galore_torch import GaLoreAdamW8bit

    optimizer: Any = GaLoreAdamW8bit(
        [_translated(group) for group in groups],
        lr=spec.learning_rate,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
    )
    # It hands its settings on by position, and bitsandbytes has dropped two of them since: "no percentile clipping"
    # (100) and "block by block" (True) would arrive as a bound on the update and as passing over entries of gradient
    # zero.
    optimizer.args.max_unorm, optimizer.args.skip_zeros = 0.0, False
    made: Optimizer = optimizer
    return made


def _translated(group: Group) -> Group:
    """The same group in galore-torch's words."""
    names = {"update_interval": "update_proj_gap", "projection": "proj_type"}
    return {names.get(key, key): value for key, value in group.items()}
