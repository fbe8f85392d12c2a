"""What every way of mounting takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from tunefleet.training.checkpoint import RunState
from tunefleet.training.engines.engine import Engine
from tunefleet.training.settings import TrainingSettings
from tunefleet_strategies.contract import ModelShape, OptimizerSpec, Precision


@dataclass(frozen=True)
class Mounted:
    """An engine with a model on it, before any checkpoint is put in."""

    state: RunState
    shape: ModelShape
    """Of the whole model, however the engine shares it out."""
    precision: Precision
    """The number formats that the engine holds the weights in."""

    @property
    def engine(self) -> Engine:
        return self.state.engine


def optimizer_spec(settings: TrainingSettings) -> OptimizerSpec:
    """What the recipe says of the optimizer."""
    return OptimizerSpec(
        name=settings.optim,
        learning_rate=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
    )
