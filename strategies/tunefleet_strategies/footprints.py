"""Bytes that a method keeps on each worker of the plain engine (nothing sharded), activations apart."""

from __future__ import annotations

from tunefleet_strategies.contract import Footprint, ModelShape, Precision

ADAM_STEP_BYTES = 4
"""torch's fused AdamW keeps one fp32 step counter for each parameter."""


def adam_footprint(shape: ModelShape, precision: Precision) -> Footprint:
    """Bytes under AdamW: gradients and both moments (m, v) have the number format of the weight they belong to."""
    trained = shape.trainable
    trained_count = sum(1 for parameter in shape.parameters if parameter.trainable)
    gradients = trained * precision.trainable.itemsize
    return Footprint(
        weights=gradients + (shape.total - trained) * precision.frozen.itemsize,
        gradients=gradients,
        optimizer_state=2 * gradients + ADAM_STEP_BYTES * trained_count,
    )
