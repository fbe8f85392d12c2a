"""Floating-point operations of a training token, and how many this device could do: their ratio is the MFU.

Per token, a weight matrix of n entries costs 2n forward, 2n for the gradient of its input (only if something before it
trains) and 2n for its own gradient (only if it trains). Attention scores are left out, recomputation does not count.
For full tuning that is 6P, for LoRA 4P plus the adapters, for freeze 2P below the first trainable layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from tunefleet_strategies.contract import ModelShape, ParameterShape

_SIDE = {"cpu": 1024, "cuda": 8192}
_POSITIONS = ("wpe", "embed_positions", "position_embeddings")


@dataclass(frozen=True)
class TokenFlops:
    """Operations per token that passes the decoder, and per target token that passes the head as well."""

    body: float
    head: float

    def of(self, tokens: int, target_tokens: int) -> float:
        return self.body * tokens + self.head * target_tokens


def token_flops(shape: ModelShape, *, expert_share: float = 1.0) -> TokenFlops:
    """Count the operations of one token.

    Args:
        shape: the model with its method attached.
        expert_share: experts that serve a token / experts there are, for fused (three-dimensional) expert weights.
    """
    vocabulary = [p for p in shape.parameters if _is_vocabulary(p, shape)]
    head_name = vocabulary[-1].name if vocabulary else ""
    body, head, below = 0.0, 0.0, False
    for parameter in shape.parameters:
        if parameter.name == head_name:
            tied = len(vocabulary) == 1
            head = _matrix(parameter, below or any(p.trainable for p in shape.parameters) if tied else below)
        elif len(parameter.shape) == 3:
            body += _matrix(parameter, below) * expert_share
        elif len(parameter.shape) == 2 and not _is_lookup(parameter, vocabulary):
            body += _matrix(parameter, below)
        below = below or parameter.trainable
    return TokenFlops(body, head)


def _matrix(parameter: ParameterShape, below: bool) -> float:
    return 2.0 * parameter.numel * (1 + below + parameter.trainable)


def _is_vocabulary(parameter: ParameterShape, shape: ModelShape) -> bool:
    return len(parameter.shape) == 2 and parameter.shape[0] == shape.vocab_size and "lora_" not in parameter.name


def _is_lookup(parameter: ParameterShape, vocabulary: list[ParameterShape]) -> bool:
    return parameter in vocabulary or any(piece in parameter.name.split(".") for piece in _POSITIONS)


@lru_cache(maxsize=8)
def peak_flops(dtype: torch.dtype, device: str) -> float:
    """Operations a second of the best of seven square matrix products, measured once in this process.

    A number for this device under its present load and thread count, not a data sheet's.
    """
    side = _SIDE[device]
    left = torch.ones(side, side, dtype=dtype, device=device)
    right = torch.ones(side, side, dtype=dtype, device=device)
    finish: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(7):
        finish()
        began = time.perf_counter()
        torch.mm(left, right)
        finish()
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best
