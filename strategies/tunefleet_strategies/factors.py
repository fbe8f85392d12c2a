"""The factors of a whole adapter at another rank.

Legend: m rows (outputs), n columns (inputs), r rank; A is (r x n), B is (m x r).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunefleet_strategies.contract import Saved
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.carrying import Factors, resized_factors
from tunefleet_strategies.optim.draws import generator_of

_NAMES = (
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_embedding_A.default", ".lora_embedding_B.default"),
)
"""How PEFT ends the names of A and B: those of matrices, and those of embeddings."""


@dataclass(frozen=True)
class _Pair:
    a: str
    b: str
    embedding: bool


def resized_adapter(saved: Saved, rank: int, now: int, scale_ratio: float, seed: int) -> Saved:
    """An adapter of rank `now` from one of rank `rank`.

    Args:
        scale_ratio: the scale so far over the new one.
        seed: with the names it decides what new directions start from.

    Raises:
        StrategyError: a factor has another rank.
    """
    weights, state = dict(saved.weights), dict(saved.optimizer["state"])
    number = {name: position for position, name in enumerate(saved.numbered)}
    for pair in _pairs(saved):
        a, b = weights[pair.a], weights[pair.b]
        if a.shape[0] != rank or b.shape[1] != rank:
            raise StrategyError(
                f"lora_rank cannot change while a run goes on: {pair.a} holds the factors of several experts; keep "
                f"lora_rank: {rank}"
            )
        states = (state.get(number[pair.a], {}), state.get(number[pair.b], {}))
        drawn = _drawn(pair, a, b, now, seed)
        new = resized_factors(Factors(a, b, *states), now, scale_ratio, drawn, fresh_in_b=pair.embedding)
        weights |= {pair.a: new.a, pair.b: new.b}
        kept: dict[Any, Any] = {number[pair.a]: new.a_state, number[pair.b]: new.b_state}
        state |= {key: value for key, value in kept.items() if key in state}
    return Saved(weights, {**saved.optimizer, "state": state}, saved.numbered)


def _pairs(saved: Saved) -> Iterator[_Pair]:
    for name in saved.weights:
        for a, b in _NAMES:
            if name.endswith(a):
                yield _Pair(name, name.removesuffix(a) + b, embedding="embedding" in a)


def _drawn(pair: _Pair, a: Tensor, b: Tensor, rank: int, seed: int) -> Tensor:
    """Start values as PEFT gives them: of A uniform with variance 1 / (3 n), of an embedding's B standard normal."""
    generator = generator_of(seed, "rank", pair.a, rank)
    if pair.embedding:
        return torch.randn((b.shape[0], rank), generator=generator)
    bound = 1 / math.sqrt(a.shape[1])
    return torch.rand((rank, a.shape[1]), generator=generator) * 2 * bound - bound
