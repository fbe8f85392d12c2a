"""The parts of a language model by the paths of their modules, as plain data. `targets.anatomy` finds them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tied:
    """An embedding whose matrix the head shares."""

    embedding: str
    head: str


@dataclass(frozen=True)
class Anatomy:
    """Paths of the parts of a language model."""

    layers: tuple[str, ...]
    """The decoder layers in order, such as `model.layers.0` or `transformer.h.0`."""
    linears: tuple[str, ...]
    """Linear maps inside the layers (`nn.Linear` and GPT-2's `Conv1D`)."""
    fused: tuple[str, ...]
    """Parameters inside the layers that hold the matrices of many experts in one tensor of three dimensions."""
    outside: tuple[str, ...]
    """Modules outside the layers that hold parameters of their own: embeddings, final norm, head."""
    embeddings: tuple[str, ...]
    """Embedding tables outside the layers."""
    heads: tuple[str, ...]
    """Linear maps outside the layers."""
    tied: Tied | None
