"""Full fine-tuning: every parameter trains.

What: the whole model is trained with AdamW (Loshchilov & Hutter, arXiv 1711.05101) or SGD; nothing is added to it.
When: there is memory for it, the data differ much from what the base has seen, or a model is trained from its start.
Settings: none of its own; `finetuning_type: full`. Learning rates are 10 to 30 times smaller than LoRA's.
Formula: AdamW, algorithm 2 with decoupled decay: p <- p - lr wd p - lr m^ / (sqrt(v^) + eps).
Bytes, N parameters: fp32 4 N weights + 4 N gradients + 8 N moments; `pure_bf16` 2 N + 2 N + 4 N.
Traps: with `pure_bf16` there is no fp32 copy, so updates below 2^-9 of a weight round away (a notice says so).
Tied embeddings are one matrix and train as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet_strategies.contract import (
    AttachContext,
    Domain,
    Footprint,
    LogUniform,
    ModelShape,
    OptimizerSpec,
    Precision,
    Strategy,
    Traits,
)
from tunefleet_strategies.footprints import adam_footprint
from tunefleet_strategies.optim.build import optimizer_over
from tunefleet_strategies.weights import hold, low_precision_notices, save_whole_model


class Full(Strategy):
    """Train every parameter of the model."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every parameter trains"
    selector: ClassVar[Mapping[str, object]] = {"finetuning_type": "full"}

    def traits(self) -> Traits:
        """Any number of workers, any sharding: nothing here depends on whole tensors."""
        return Traits(shardings=frozenset({"zero0", "zero1", "zero2", "zero3", "fsdp2"}))

    def attach(self, model: nn.Module, context: AttachContext) -> nn.Module:
        """Make every parameter trainable, in the trainable number format."""
        model.requires_grad_(True)
        hold(model, context.precision)
        return model

    def notices(self, model: nn.Module, updates: int | None = None, seed: int | None = None) -> list[str]:
        """Say what half-precision weights without a master copy cost."""
        return low_precision_notices(model)

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """AdamW or SGD over everything; norms and biases are not decayed."""
        return optimizer_over(model, spec)

    def footprint(self, shape: ModelShape, precision: Precision) -> Footprint:
        """Weights, as many gradients, and two moments."""
        return adam_footprint(shape, precision)

    def search_space(self) -> dict[str, Domain]:
        """Full tuning has no argument of its own; the learning rate decides."""
        return {"learning_rate": LogUniform(1e-6, 1e-4)}

    def export(self, model: nn.Module, folder: Path, initial: Mapping[str, Tensor]) -> None:
        """Write the whole model in one number format, as `transformers` loads it."""
        save_whole_model(model, folder)
