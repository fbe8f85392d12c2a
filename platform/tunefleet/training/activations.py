"""Trading time for memory: activations computed again in the backward pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from tunefleet.models import causal_lm


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the inputs of each layer and compute the rest again in the backward pass.

    Non-reentrant: gradients reach adapters in frozen layers without a detour over the embeddings, the random state of
    dropout is replayed, and layers without anything to train below them are not run twice.
    """
    base: Any = causal_lm(model)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embedding's output require a gradient as well, which only reentrant checkpoints need. Here
    # it would drive the backward pass through frozen layers below everything that trains.
    base.disable_input_require_grads()
