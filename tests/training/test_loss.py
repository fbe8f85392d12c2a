"""Cross-entropy chunk by chunk at supervised positions: the same numbers as the plain way, with less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.training.tiny import ARCHITECTURES, FP32, MIXED, VOCABULARY, MemoryRows, build
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tunefleet.data.batches import Batch, collate
from tunefleet.training import loss as loss_module
from tunefleet.training.layout import choose_layout, forward_kwargs
from tunefleet.training.loss import cross_entropy_sum, objective
from tunefleet_strategies.contract import AttachContext, Strategy
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora

_GROUPED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}

RESCALED: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED, head_dim=8, final_logit_softcapping=1.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_GROUPED, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_GROUPED, logits_scaling=3.0)),
}

METHODS: dict[str, Strategy] = {
    "full": Full(),
    "lora": Lora(lora_rank=4),
    "lora_and_whole_head": Lora(lora_rank=4, additional_target=("lm_head",)),
    "lora_on_head": Lora(lora_rank=4, lora_target=("q_proj", "lm_head")),
    "last_layer": Freeze(freeze_trainable_layers=1),
}


def plain(model: nn.Module, batch: Batch, total: int) -> tuple[float, dict[str, Tensor]]:
    """All logits at once, through the model's own forward."""
    model.zero_grad()
    logits = model(**forward_kwargs(batch)).logits.flatten(0, 1)[batch.target_positions]
    loss = nn.functional.cross_entropy(logits.float(), batch.target_ids, reduction="sum")
    (loss / total).backward()
    return loss.item(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: nn.Module, two_stage: bool, *, one_backward: bool = False) -> None:
    rows = MemoryRows(count=6)
    batch = collate(rows.rows, pad_token_id=None)
    expected_loss, expected = plain(model, batch, total=101)
    loss = objective(model, FP32, one_backward=one_backward)
    assert loss.two_stage == two_stage
    model.zero_grad()
    assert loss.backward(batch, 101).item() == pytest.approx(expected_loss, rel=1e-6)
    ours = gradients(model)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-8, name


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few logits at a time that a batch needs several chunks of the smallest size there is."""
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 1)
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", 7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("architecture", ["llama", "qwen2_tied"])
def test_two_stages_equal_one(method: str, architecture: str) -> None:
    if architecture == "qwen2_tied" and method in ("lora_and_whole_head", "lora_on_head"):
        pytest.skip("a tied head cannot be adapted by itself")
    model = METHODS[method].attach(build(ARCHITECTURES[architecture]), AttachContext(FP32))
    choose_layout(model, FP32)
    assert_equal(model, two_stage=True)


def test_each_gradient_comes_in_one_piece_where_a_method_asks_for_it() -> None:
    model = METHODS["full"].attach(build(ARCHITECTURES["llama"]), AttachContext(FP32))
    choose_layout(model, FP32)
    arrivals: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor: arrivals.append(id(tensor)))
    assert_equal(model, two_stage=False, one_backward=True)
    ours = arrivals[len(arrivals) // 2 :]  # the first half are those of the plain loss
    assert len(ours) == len(set(ours)) == len(list(model.parameters()))


@pytest.mark.usefixtures("small_chunks")
def test_nothing_below_the_head_trains() -> None:
    model = build(ARCHITECTURES["llama"]).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    choose_layout(model, FP32)
    assert_equal(model, two_stage=True)


@pytest.mark.parametrize("name", list(RESCALED))
def test_models_that_rescale_their_logits_take_the_other_way(name: str) -> None:
    model = build(RESCALED[name])
    choose_layout(model, FP32)
    assert_equal(model, two_stage=False)


def test_only_one_chunk_of_logits_lives_at_a_time() -> None:
    config = LlamaConfig(
        vocab_size=2**15, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    choose_layout(model, FP32)
    ids = torch.randint(0, 2**15, (1024,)).int().numpy()
    row = MemoryRows(count=1).rows[0]._replace(input_ids=ids, labels=ids, segments=torch.tensor([1024]).numpy())
    batch = collate([row], pad_token_id=None)
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: widths.append(logits.shape[0]))
    objective(model, FP32).backward(batch, 1023)
    assert sum(widths[2:]) == 1023  # the first two are the probe's
    assert max(widths[2:]) == 2**22 // 2**15


def test_cross_entropy_is_that_of_torch() -> None:
    logits = (10 * torch.randn(50, 31)).requires_grad_()
    targets = torch.randint(0, 31, (50,))
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected * 0.5, logits)
    ours = cross_entropy_sum(logits, targets)
    (gradient,) = torch.autograd.grad(ours * 0.5, logits)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32() -> None:
    logits = torch.randn(64, 500).bfloat16()
    targets = torch.randint(0, 500, (64,))
    expected = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    assert cross_entropy_sum(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("method", ["full", "lora", "last_layer"])
def test_under_autocast_close_to_fp32(architecture: str, method: str) -> None:
    rows = MemoryRows(count=6)
    losses = []
    for precision in (FP32, MIXED):
        model = METHODS[method].attach(build(ARCHITECTURES[architecture]), AttachContext(precision))
        assert not choose_layout(model, precision).padded
        losses.append(objective(model, precision).backward(collate(rows.rows, pad_token_id=None), 50).item())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_router_loss_counts_only_when_the_config_asks_for_it() -> None:
    rows, gates = MemoryRows(count=4), []
    batch = collate(rows.rows, pad_token_id=None)
    for asked in (False, True):
        config = Qwen3MoeConfig(**_GROUPED, **_EXPERTS, output_router_logits=asked, router_aux_loss_coef=10.0)
        model = build(lambda config=config: Qwen3MoeForCausalLM(config))  # type: ignore[misc]
        choose_layout(model, FP32)
        loss = objective(model, FP32)
        loss.backward(batch, int(rows.targets.sum()))
        gates.append(model.model.layers[0].mlp.gate.weight.grad.clone())
    assert not torch.allclose(gates[0], gates[1], rtol=1e-2)


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    model = build(ARCHITECTURES["llama"])
    choose_layout(model, FP32)
    row = MemoryRows(count=1).rows[0]
    batch = collate([row._replace(labels=row.labels * 0 - 100)], pad_token_id=None)
    assert objective(model, FP32).backward(batch, 7).item() == 0.0
    assert not gradients(model)
