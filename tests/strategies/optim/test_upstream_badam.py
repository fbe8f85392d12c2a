"""`optimizer_backend: upstream`: the published optimizers behind our contract."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from badam import BlockOptimizer, BlockOptimizerRatio
from tests.storages import live_bytes

from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.upstream_badam import UpstreamBlock, UpstreamRatio

Call = Callable[..., Any]

SPEC = OptimizerSpec("adamw_torch", 1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """It warns of fp32 weights, and collects garbage at every switch, which takes long with many modules loaded."""
    gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    gc.unfreeze()


def upstream(**keys: Any) -> BAdam:
    return BAdam(optimizer_backend="upstream", **{"badam_switch_interval": 2, **keys})


@pytest.mark.parametrize(
    "keys", [{}, {"badam_switch_mode": "random"}, {"badam_switch_mode": "fixed"}, {"badam_start_block": 1}], ids=str
)
def test_layer_mode_learns(keys: dict[str, Any], architecture: str, build: Call, attach: Call, train: Call) -> None:
    strategy = upstream(**keys)
    model = attach(strategy, build(architecture))
    optimizer = strategy.optimizer(model, SPEC)
    assert isinstance(optimizer, UpstreamBlock)
    assert isinstance(optimizer.inner, BlockOptimizer)
    model = attach(strategy, build(architecture))
    losses = train(strategy, model, steps=6)
    assert losses[-1] < losses[0]


def test_learning_rates_reach_the_published_optimizers(build: Call, attach: Call, tokens: torch.Tensor) -> None:
    for strategy in (upstream(), upstream(badam_mode="ratio")):
        model = attach(strategy, build("llama"))
        optimizer = strategy.optimizer(model, SPEC)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_ratio_mode_learns_and_its_norm_is_that_of_what_it_uses(
    build: Call, attach: Call, tokens: torch.Tensor
) -> None:
    strategy = upstream(badam_mode="ratio", badam_update_ratio=0.5)
    model = attach(strategy, build("llama"))
    optimizer = strategy.optimizer(model, SPEC)
    assert isinstance(optimizer, UpstreamRatio)
    assert isinstance(optimizer.inner, BlockOptimizerRatio)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        kept = [p.grad.coalesce().values() for p in model.parameters() if p.grad is not None]
        assert all(p.grad.is_sparse for p in model.parameters() if p.grad is not None)
        assert float(optimizer.gradient_norm()) == pytest.approx(float(torch.cat(kept).norm()), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("architecture", "part"), [("gpt2", "embed"), ("qwen2_tied", "lm_head")])
def test_models_on_which_ratio_mode_fails_are_refused(architecture: str, part: str, build: Call, attach: Call) -> None:
    strategy = upstream(badam_mode="ratio")
    model = attach(strategy, build(architecture))
    with pytest.raises(StrategyError, match=f"needs a parameter named {part}.*write optimizer_backend: native"):
        strategy.optimizer(model, SPEC)


@pytest.mark.parametrize("mode", ["layer", "ratio"])
def test_a_saved_state_is_not_taken_back(mode: Any, build: Call, attach: Call) -> None:
    strategy = upstream(badam_mode=mode)
    optimizer = strategy.optimizer(attach(strategy, build("llama")), SPEC)
    with pytest.raises(StrategyError, match="write native to resume"):
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("formats", ["fp32", "pure_bf16"])
def test_bytes_of_layer_mode(
    formats: str, build: Call, attach: Call, tokens: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    """It copies fp32 weights as well; torch's fused AdamW counts in a tensor for each parameter."""
    strategy = upstream(badam_switch_interval=9)
    model = attach(strategy, build("llama"), precision=request.getfixturevalue(formats))
    optimizer = strategy.optimizer(model, SPEC)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert isinstance(optimizer, UpstreamBlock)
    base = optimizer.inner.base_optimizer
    kept = [tensor for state in base.state.values() for tensor in state.values()]
    kept += list(optimizer.inner.param_idx2hp.values())
    assert live_bytes(kept) == 12 * 7_744 + 4 * 9
