"""What the optimizers of real runs keep, counted in live storages, against formulas worked out by hand from shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import pytest
from tests import by_hand
from tests.storages import live_bytes
from tests.training.tiny import FP32, MIXED, PURE, VOCABULARY, Run, start
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.contract import Precision, Strategy
from tunefleet_strategies.full import Full
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.optim.block_adamw import BlockAdamW
from tunefleet_strategies.optim.projection import Projection
from tunefleet_strategies.optim.ratio_adamw import RatioAdamW

TINY = by_hand.Llama(vocabulary=VOCABULARY, hidden=32, intermediate=48, layers=2, key_value=16)
FORMATS = pytest.mark.parametrize("precision", [FP32, MIXED, PURE], ids=["fp32", "bf16", "pure_bf16"])
RANK = 20
"""More than the 16 rows of k and v, less than any side of the others."""


def tensors(optimizer: Optimizer) -> list[Tensor]:
    return [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]


def begin(strategy: Strategy, precision: Precision, updates: int) -> Run:
    return start(strategy, "llama", precision=precision, updates=updates)


def weight_bytes(precision: Precision) -> int:
    return precision.trainable.itemsize


@FORMATS
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("kind", get_args(Projection))
def test_galore(kind: Projection, layerwise: bool, precision: Precision) -> None:
    """After a refresh that had a basis before it; svd too, whose bases begin as views of all of U and V."""
    strategy = GaLore(
        galore_rank=RANK,
        galore_scale=1.0,
        galore_update_interval=2,
        galore_proj_type=kind,
        galore_layerwise=layerwise,
        galore_refresh="subspace" if layerwise else "svd",
    )
    run = begin(strategy, precision, updates=3)
    list(run.steps())
    state = live_bytes(tensors(run.engine.optimizer))
    assert state == by_hand.galore(TINY, weight_bytes(precision), RANK, kind)


@FORMATS
def test_full_tuning_beside_it(precision: Precision) -> None:
    run = begin(Full(), precision, updates=2)
    list(run.steps())
    assert live_bytes(tensors(run.engine.optimizer)) == by_hand.full(TINY, weight_bytes(precision))


def gradient_bytes(run: Run, seen: list[int]) -> None:
    """Note the gradients that each update finds."""

    def note(*_: object) -> None:
        seen.append(live_bytes(p.grad for p in run.model.parameters() if p.grad is not None))

    run.engine.optimizer.register_step_pre_hook(note)


@FORMATS
def test_badam_by_layer(precision: Precision) -> None:
    """Every block in turn: embedding, two layers, the head with the final norm."""
    strategy = BAdam(badam_switch_interval=2, badam_include_embedding=True, badam_include_lm_head=True)
    run = begin(strategy, precision, updates=8)
    assert isinstance(run.engine.optimizer, BlockAdamW)
    gradients: list[int] = []
    gradient_bytes(run, gradients)
    q, table = weight_bytes(precision), VOCABULARY * 32
    blocks = [table, sum(TINY.layer()), sum(TINY.layer()), table + 32]
    kept = [live_bytes(tensors(run.engine.optimizer)) for _ in run.steps()]
    assert kept == [size for entries in blocks for size in (by_hand.badam_layer(entries, q), 0)]  # 0: it has switched
    assert gradients == [q * entries for entries in blocks for _ in range(2)]


@FORMATS
@pytest.mark.parametrize("mask_mode", ["adjacent", "scatter"])
def test_badam_by_ratio(mask_mode: str, precision: Precision) -> None:
    strategy = BAdam.model_validate({"badam_mode": "ratio", "badam_mask_mode": mask_mode, "badam_switch_interval": 9})
    run = begin(strategy, precision, updates=2)
    optimizer = run.engine.optimizer
    assert isinstance(optimizer, RatioAdamW)
    gradients: list[int] = []
    gradient_bytes(run, gradients)
    list(run.steps())
    q = weight_bytes(precision)
    scatter = mask_mode == "scatter"
    places = places_of(optimizer, (p for name, p in run.model.named_parameters() if name in run.state.trained))
    assert live_bytes([*tensors(optimizer), *places]) == by_hand.badam_ratio(TINY, q, 0.05, scatter=scatter)
    assert bool(places) == scatter
    assert gradients == 2 * [q * 2 * sum(TINY.layer())]  # whole ones


def places_of(optimizer: RatioAdamW, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    windows = [optimizer.window(parameter) for parameter in parameters]
    return [window.index for window in windows if window.index is not None]
