"""The learning rate as a pure function of the update's number, so that nothing of it needs saving."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tunefleet.errors import Refused
from tunefleet.training.settings import TrainingSettings


class LearningRate:
    """Sets the rate of every parameter group before an update. Each group keeps its own base rate (LoRA+).

    Base rates are those that the optimizer was built with, whatever a checkpoint says that is loaded into it later.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self._optimizer = optimizer
        self._peaks = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self._factor = factor

    def set(self, applied: int) -> float:
        """Set the rates for the update that follows `applied` ones.

        Returns:
            The rate of the first group.
        """
        factor = self._factor(applied)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["initial_lr"], group["lr"] = peak, peak * factor
        return float(self._optimizer.param_groups[0]["lr"])


def build_scheduler(optimizer: Optimizer, settings: TrainingSettings, updates: int) -> LearningRate:
    """The schedule `lr_scheduler_type` over `updates` updates, its shape taken from transformers.

    Raises:
        Refused: a schedule that is not a function of the step alone.
    """
    from transformers.optimization import get_scheduler  # 0.5 s to import, and `plan` only needs the rest

    name = settings.lr_scheduler_type
    warmup = settings.warmup_steps if settings.warmup_steps > 0 else math.ceil(updates * settings.warmup_ratio)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=updates)
    if not isinstance(scheduler, LambdaLR):
        raise Refused(f"lr_scheduler_type {name} is not a function of the step alone: take linear, cosine or constant.")
    return LearningRate(optimizer, scheduler.lr_lambdas[0])
