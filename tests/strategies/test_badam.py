"""BAdam as a strategy: its blocks on four architectures, its bytes, its notices, its refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.storages import live_bytes
from transformers import AutoModelForCausalLM

from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.blocks import listed
from tunefleet_strategies.contract import ModelShape, OptimizerName, OptimizerSpec, ParameterShape, Precision
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.block_adamw import BlockAdamW
from tunefleet_strategies.optim.ratio_adamw import RatioAdamW
from tunefleet_strategies.targets import anatomy

Call = Callable[..., Any]

SPEC = OptimizerSpec("adamw_torch", 1e-2, weight_decay=0.1, seed=3)
BOTH_ENDS: dict[str, Any] = {"badam_include_embedding": True, "badam_include_lm_head": True}
LAYERS = {"llama": "model.layers", "qwen2_tied": "model.layers", "gpt2": "transformer.h", "moe": "model.layers"}
TABLES = {
    "llama": {"model.embed_tokens.weight"},
    "qwen2_tied": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "moe": {"model.embed_tokens.weight"},
}
ENDS = {
    "llama": {"model.norm.weight", "lm_head.weight"},
    "qwen2_tied": {"model.norm.weight"},
    "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    "moe": {"model.norm.weight", "lm_head.weight"},
}


def shape_of(model: torch.nn.Module) -> ModelShape:
    parameters = tuple(ParameterShape(n, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters())
    return ModelShape("tiny", 64, 32, 3, parameters, anatomy(model))


def blocks(strategy: BAdam, model: torch.nn.Module) -> list[tuple[str, set[str]]]:
    optimizer = strategy.optimizer(model, SPEC)
    assert isinstance(optimizer, BlockAdamW)
    return [(block.label, set(block.parameters)) for block in optimizer.blocks]


@pytest.mark.parametrize("meta", [False, True])
def test_blocks_are_embedding_layers_head_in_this_order(
    architecture: str, meta: bool, build: Call, attach: Call
) -> None:
    strategy = BAdam(**BOTH_ENDS)
    model = attach(strategy, build(architecture, meta=meta))
    found = blocks(strategy, model)
    layers = LAYERS[architecture]
    assert [label for label, _ in found] == ["embedding", *(f"{layers}.{n}" for n in range(3)), "lm_head"]
    assert found[0][1] == TABLES[architecture]
    assert found[-1][1] == ENDS[architecture]
    everything = [name for name, _ in model.named_parameters()]
    for number, (_, names) in enumerate(found[1:-1]):
        assert names == {name for name in everything if name.startswith(f"{layers}.{number}.")}
    assert sorted(name for _, names in found for name in names) == sorted(everything)


def test_by_default_only_layers_are_blocks(architecture: str, build: Call, attach: Call) -> None:
    model = attach(BAdam(), build(architecture))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(f"{LAYERS[architecture]}.")}
    assert [label for label, _ in blocks(BAdam(), model)] == [f"{LAYERS[architecture]}.{n}" for n in range(3)]


def test_the_head_of_tied_embeddings_cannot_train_alone(build: Call, attach: Call) -> None:
    for model in (build("qwen2_tied"), build("qwen2_tied", meta=True)):
        with pytest.raises(StrategyError, match=r"badam_include_lm_head.*write badam_include_embedding: true"):
            attach(BAdam(badam_include_lm_head=True), model)


def test_a_start_block_that_is_none_is_refused(build: Call, attach: Call) -> None:
    with pytest.raises(StrategyError, match=r"badam_start_block: 3 is no block.*0 to 2"):
        attach(BAdam(badam_start_block=3), build("llama"))
    attach(BAdam(badam_start_block=4, **BOTH_ENDS), build("llama"))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"badam_switch_interval": 0}, "badam_switch_interval: 0"),
        ({"badam_switch_interval": -2}, "greater than or equal to -1"),
        ({"badam_start_block": -1}, "greater than or equal to 0"),
        ({"badam_update_ratio": 0.0}, "greater than 0"),
        ({"badam_update_ratio": 1.1}, "less than or equal to 1"),
        ({"badam_verbose": 3}, "less than or equal to 2"),
        ({"optimizer_backend": "upstream", "badam_switch_interval": -1}, "write optimizer_backend: native"),
        (
            {"optimizer_backend": "upstream", "badam_switch_mode": "random", "badam_start_block": 1},
            "write optimizer_backend: native",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        BAdam(**keys)


@pytest.mark.parametrize("name", ["sgd", "adamw_8bit"])
def test_it_is_a_form_of_adamw(name: OptimizerName, build: Call, attach: Call) -> None:
    model = attach(BAdam(), build("llama"))
    with pytest.raises(StrategyError, match=f"badam cannot use optim: {name}.*; write optim: adamw_torch"):
        BAdam().optimizer(model, OptimizerSpec(name, 1e-2))


def test_traits_by_mode() -> None:
    layer, ratio = BAdam().traits(), BAdam(badam_mode="ratio").traits()
    assert (layer.max_workers, layer.shardings, layer.resumable) == (None, frozenset({"zero3", "fsdp2"}), True)
    assert (ratio.max_workers, ratio.shardings, ratio.resumable) == (1, frozenset(), True)
    assert ratio.limited_by == "badam_mode: ratio"
    for mode, accumulates in (("layer", True), ("ratio", False)):
        upstream = BAdam(badam_mode=mode, optimizer_backend="upstream").traits()
        assert (upstream.max_workers, upstream.resumable, upstream.accumulation) == (1, False, accumulates)
    both = BAdam(badam_mode="ratio", optimizer_backend="upstream")
    assert both.label() == "badam with badam_mode: ratio and optimizer_backend: upstream"


def test_norms_and_biases_are_not_decayed(architecture: str, build: Call, attach: Call) -> None:
    model = attach(BAdam(**BOTH_ENDS), build(architecture))
    groups = BAdam(**BOTH_ENDS).optimizer(model, SPEC).param_groups
    assert {group["name"]: group["weight_decay"] for group in groups} == {"base": 0.1, "base_nodecay": 0.0}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "strategy",
    [
        BAdam(),
        BAdam(**BOTH_ENDS),
        BAdam(badam_switch_mode="fixed", badam_start_block=1, **BOTH_ENDS),
        BAdam(badam_mode="ratio", badam_update_ratio=0.3),
        BAdam(badam_mode="ratio", badam_update_ratio=0.3, badam_mask_mode="scatter", **BOTH_ENDS),
    ],
    ids=["layer", "layer_ends", "layer_fixed", "ratio", "ratio_scatter_ends"],
)
@pytest.mark.parametrize("formats", ["fp32", "autocast", "pure_bf16"])
def test_the_footprint_is_what_lives(
    strategy: BAdam,
    formats: str,
    architecture: str,
    build: Call,
    attach: Call,
    tokens: torch.Tensor,
    request: pytest.FixtureRequest,
) -> None:
    """Counted over a walk through every block: the most that gradients and state ever take."""
    precision: Precision = request.getfixturevalue(formats)
    short = strategy.model_copy(update={"badam_switch_interval": 2})
    estimate = strategy.footprint(
        shape_of(attach(strategy, build(architecture, meta=True), precision=precision)), precision
    )
    model = attach(short, build(architecture), precision=precision)
    optimizer = short.optimizer(model, SPEC)
    assert live_bytes(list(model.parameters())) == estimate.weights
    gradients, state = [], []
    for number in range(10):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
            model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(live_bytes([p.grad for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        if number % 2 == 0:
            tensors = [tensor for one in optimizer.state.values() for tensor in one.values()]
            if isinstance(optimizer, RatioAdamW):
                places = [optimizer.window(p).index for p in model.parameters() if p.requires_grad]
                tensors += [index for index in places if index is not None]
            state.append(live_bytes(tensors))
        optimizer.zero_grad()
    assert max(gradients) == estimate.gradients
    assert max(state) == estimate.optimizer_state


def test_the_footprint_by_hand(build: Call, attach: Call, pure_bf16: Precision, fp32: Precision) -> None:
    """Llama: 64 x 32 embedding and head, three layers of 7,744 entries, a norm of 32."""
    meta = attach(BAdam(), build("llama", meta=True))
    layer, everything = 7_744, 3 * 7_744 + 2 * 64 * 32 + 32
    bf16 = BAdam().footprint(shape_of(meta), pure_bf16)
    assert (bf16.weights, bf16.gradients, bf16.optimizer_state) == (2 * everything, 2 * layer, 12 * layer)
    full = BAdam().footprint(shape_of(meta), fp32)
    assert (full.weights, full.gradients, full.optimizer_state) == (4 * everything, 4 * layer, 8 * layer)
    # 5 % of q, o (1,024), k, v (512), gate, up, down (1,536) and both norms (32, whole), in three layers.
    active = 3 * (2 * 51 + 2 * 25 + 3 * 76 + 2 * 32)
    ratio = BAdam(badam_mode="ratio").footprint(shape_of(meta), pure_bf16)
    assert (ratio.gradients, ratio.optimizer_state) == (2 * 3 * layer, 12 * active)
    spread = BAdam(badam_mode="ratio", badam_mask_mode="scatter").footprint(shape_of(meta), fp32)
    assert spread.optimizer_state == 8 * active + 4 * (active - 3 * 2 * 32)


def test_what_stays_as_it_is_is_told(build: Call, attach: Call, pure_bf16: Precision) -> None:
    model = attach(BAdam(), build("llama"), precision=pure_bf16)
    (text,) = BAdam().notices(model)
    assert "model.embed_tokens.weight, model.norm.weight, lm_head.weight as they are (4,128 of 27,360" in text
    assert "badam_include_embedding: true and badam_include_lm_head: true would train them" in text
    both = BAdam(**BOTH_ENDS)
    assert both.notices(attach(both, build("llama"), precision=pure_bf16)) == []


@pytest.mark.parametrize(
    ("keys", "updates", "expected"),
    [
        ({}, 101, None),
        ({}, 100, "never train model.layers.2 in 100 updates; badam_switch_interval: 33 would reach every block"),
        ({"badam_switch_mode": "descending"}, 50, "never train model.layers.0, model.layers.1 in 50"),
        ({"badam_switch_mode": "fixed", "badam_start_block": 1}, 900, "never train model.layers.0, model.layers.2 in"),
        ({"badam_switch_interval": -1}, 900, "never train model.layers.1, model.layers.2 in 900"),
        ({"badam_switch_mode": "random"}, 100, "never train 1 of 3 blocks, drawn at random, in 100"),
        ({"badam_switch_interval": 1}, 2, "never train model.layers.2 in 2 updates; it takes at least 3 updates"),
        ({"badam_mode": "ratio"}, 10, None),
    ],
)
def test_blocks_that_the_schedule_never_visits_are_named(
    keys: dict[str, Any], updates: int, expected: str | None, build: Call, attach: Call, pure_bf16: Precision
) -> None:
    strategy = BAdam(**keys)
    model = attach(strategy, build("llama", meta=True), precision=pure_bf16)
    told = [text for text in strategy.notices(model, updates) if "never train" in text]
    assert len(told) == (0 if expected is None else 1)
    assert expected is None or expected in told[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_seed_says_which_blocks_chance_leaves_out(
    seed: int, build: Call, attach: Call, train: Call, pure_bf16: Precision
) -> None:
    """What the plan foretells is what the optimizer then does."""
    strategy = BAdam(badam_switch_mode="random", badam_switch_interval=2)
    model = attach(strategy, build("llama"), precision=pure_bf16)
    (told,) = [text for text in strategy.notices(model, 4, seed) if "never train" in text]
    optimizer = strategy.optimizer(model, replace(SPEC, seed=seed))
    assert isinstance(optimizer, BlockAdamW)
    seen = set()
    for _ in range(4):
        seen.add(optimizer.active.label)
        optimizer.step()
    (left_out,) = {block.label for block in optimizer.blocks} - seen
    assert f"never train {left_out} in 4 updates" in told


def test_the_published_optimizer_moves_on_one_update_early(
    build: Call, attach: Call, tokens: torch.Tensor, pure_bf16: Precision
) -> None:
    """Its blocks are foretold as it walks them, its other rules are told, and its random order is not guessed."""
    strategy = BAdam(optimizer_backend="upstream", badam_switch_interval=2)
    model = attach(strategy, build("llama"), precision=pure_bf16)
    optimizer = strategy.optimizer(model, SPEC)
    seen, told = set(), []
    for updates in range(1, 5):
        seen |= {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        told = [text for text in strategy.notices(model, updates) if "never train" in text]
        missing = sorted({"0", "1", "2"} - seen)
        assert [all(f"model.layers.{number}" in text for number in missing) for text in told] == [True] * bool(missing)
    assert seen == {"0", "1", "2"}
    assert told == []
    assert any("weight_decay touches norms and biases" in text for text in strategy.notices(model))
    drawn = strategy.model_copy(update={"badam_switch_mode": "random"})
    assert "1 of 3 blocks, drawn at random," in " ".join(drawn.notices(model, 2, seed=0))


def test_long_lists_of_blocks_are_drawn_together() -> None:
    labels = [f"h.{number}" for number in range(9)]
    assert listed(labels, {0, 2, 3, 5, 6, 7, 8}) == "h.0, h.2, h.3, h.5 to h.8"


@pytest.mark.parametrize("formats", ["fp32", "autocast"])
@pytest.mark.parametrize("mode", ["layer", "ratio"])
def test_bytes_lost_without_bf16_weights_are_stated(
    formats: str, mode: Any, build: Call, attach: Call, request: pytest.FixtureRequest
) -> None:
    precision: Precision = request.getfixturevalue(formats)
    strategy = BAdam(badam_mode=mode)
    model = attach(strategy, build("llama"), precision=precision)
    (text,) = [text for text in strategy.notices(model) if "pure_bf16" in text]
    layer, frozen = 7_744, 2 * 64 * 32 + 32
    kept = frozen * (2 if formats == "autocast" else 4)
    active = 3 * (2 * 51 + 2 * 25 + 3 * 76 + 2 * 32)
    if mode == "layer":
        now, bf16 = 4 * 3 * layer + kept + 12 * layer, 2 * (3 * layer + frozen) + 14 * layer
    else:
        now, bf16 = 8 * 3 * layer + kept + 8 * active, 4 * 3 * layer + 2 * frozen + 12 * active
    assert f"takes {now - bf16:,} bytes more" in text
    assert text.endswith("write pure_bf16: true to save them")


@pytest.mark.parametrize("mode", ["layer", "ratio"])
def test_the_loss_falls_and_the_export_loads(
    mode: Any, architecture: str, build: Call, attach: Call, train: Call, logits: Call, tmp_path: Any
) -> None:
    strategy = BAdam(badam_mode=mode, badam_switch_interval=2, badam_update_ratio=0.5)
    model = attach(strategy, build(architecture))
    losses = train(strategy, model, steps=8)
    assert losses[-1] < losses[0]
    strategy.export(model, tmp_path, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_a_search_draws_what_the_mode_has() -> None:
    assert {*BAdam().search_space()} == {"badam_switch_interval", "badam_switch_mode", "learning_rate"}
    ratio = BAdam(badam_mode="ratio")
    assert {*ratio.search_space()} == {
        "badam_switch_interval",
        "badam_update_ratio",
        "badam_mask_mode",
        "learning_rate",
    }
    for strategy in (BAdam(), ratio):
        assert not strategy.search_space().keys() & strategy.unused().keys()
