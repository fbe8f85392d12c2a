"""Which number format holds what, decided from the recipe and the hardware. `Strategy.attach` carries it out."""

from __future__ import annotations

import torch
from torch import nn

from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.training.settings import TrainingSettings
from tunefleet_strategies.contract import Precision


def resolve(settings: TrainingSettings, hardware: Hardware) -> tuple[Precision, tuple[str, ...]]:
    """Decide the number formats of a run.

    `bf16: true` = fp32 weights of what trains, bf16 compute, frozen weights in bf16. `pure_bf16: true` = bf16
    everywhere, no master copy. Neither = as `bf16: true` where the hardware has it, else fp32. `bf16: false` = fp32.
    `fp16: true` = fp32 weights of what trains, fp16 compute with a loss scaler.

    Returns:
        The precision and sentences that the plan shows.

    Raises:
        Refused: two formats at once, or fp16 on a CPU.
    """
    asked = [
        key
        for key, on in (("bf16", settings.bf16), ("fp16", settings.fp16), ("pure_bf16", settings.pure_bf16))
        if on is True
    ]
    if len(asked) > 1 and "fp16" in asked:
        raise Refused(f"{asked[0]} and {asked[1]} ask for different number formats: keep one of the two.")
    if settings.fp16:
        return _half(hardware), ()
    if settings.pure_bf16:
        return Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16), _emulated(hardware)
    if settings.bf16 is True:
        return _mixed(torch.bfloat16), _emulated(hardware)
    if settings.bf16 is None and hardware.bf16:
        return _mixed(torch.bfloat16), ("Computing in bf16, which this hardware has; bf16: false computes in fp32.",)
    return Precision(torch.float32, torch.float32, torch.float32), ()


def _mixed(compute: torch.dtype) -> Precision:
    return Precision(compute=compute, trainable=torch.float32, frozen=compute)


def _half(hardware: Hardware) -> Precision:
    if hardware.device == "cpu":
        raise Refused("fp16 does not run at a useful speed on a CPU: write bf16: true, or leave fp16 out.")
    return _mixed(torch.float16)


def _emulated(hardware: Hardware) -> tuple[str, ...]:
    if hardware.bf16:
        return ()
    return (
        f"This {hardware.device} has no native bf16, so bf16 is slower than fp32 here; bf16: false computes in fp32.",
    )


def autocast(model: nn.Module, precision: Precision) -> torch.autocast:
    """The context in which forward passes run: autocast to `compute` where that differs from what trains."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=precision.compute if precision.autocast else None, enabled=precision.autocast)
