"""Rows laid end to end: equal to the padded batch, never mixed, never slower."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.training.tiny import ARCHITECTURES, FP32, MIXED, VOCABULARY, MemoryRows, build
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from tunefleet.data.batches import collate
from tunefleet.training.attention import SEGMENTS, SegmentsUnsupported, in_compute_format, segment_attention
from tunefleet.training.layout import choose_layout, probe
from tunefleet.training.loss import objective

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 2}

JOINED: dict[str, Callable[[], PreTrainedModel]] = {
    **ARCHITECTURES,
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=4)),
    "gemma2_window_softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_COMMON, intermediate_size=48)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),
}
"""OPT is here and not below: its positions are arguments in this version of transformers, and the probe sees it."""

PADDED: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0)
    ),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)),
    "llama4_chunks": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**_GROUPED, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=64, head_dim=8)
    ),
}
"""ALiBi, a state-space model, and local chunks longer than the probe's segments, which only the mask knows about."""


def alone(model: PreTrainedModel, rows: MemoryRows) -> tuple[float, Tensor]:
    """The reference: every row by itself, in the attention the model came with. Summed loss, gradient of the mean."""
    model.zero_grad()
    total = 0.0
    for row in rows.rows:
        ids, labels = (torch.from_numpy(x).long() for x in (row.input_ids, row.labels))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        (loss / int(rows.targets.sum())).backward()
        total += loss.item()
    return total, gradient(model)


def gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", [*JOINED, *PADDED])
def test_loss_and_gradient_equal_those_of_every_row_alone(name: str) -> None:
    rows = MemoryRows(count=5)
    model = build((JOINED | PADDED)[name]).train()
    expected_loss, expected = alone(model, rows)
    before = torch.get_rng_state()
    layout = choose_layout(model, FP32)
    loss = objective(model, FP32)
    assert torch.equal(before, torch.get_rng_state())
    assert layout.padded == (name in PADDED)
    assert bool(layout.notices) == layout.padded
    model.zero_grad()
    batch = collate(rows.rows, pad_token_id=2 if layout.padded else None)
    total = loss.backward(batch, int(rows.targets.sum()))
    assert total.item() == pytest.approx(expected_loss, rel=1e-6)
    assert float((gradient(model) - expected).norm()) <= 1e-5 * float(expected.norm())
    assert loss.evaluate(batch).item() == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_end_to_end_equals_padded_in_bf16(name: str) -> None:
    rows = MemoryRows(count=5)
    losses = []
    for pad in (None, 2):
        model = build(ARCHITECTURES[name]).bfloat16()
        assert not choose_layout(model, MIXED).padded
        if pad is not None:
            model.set_attn_implementation("sdpa")
        losses.append(objective(model, MIXED).evaluate(collate(rows.rows, pad_token_id=pad)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_probe_sees_a_model_whose_rows_mix() -> None:
    """Guards the probe itself: the same weights, once with a leak between the segments."""
    model = build(ARCHITECTURES["llama"])
    assert probe(model, FP32)
    leak = model.model.layers[0].register_forward_hook(lambda _, __, output: output + 1e-2 * output.mean(1, True))
    assert not probe(model, FP32)
    leak.remove()
    assert probe(model, FP32)
    assert model.config._attn_implementation == "sdpa"


def test_no_mask_over_the_whole_batch_is_built() -> None:
    """64 segments of 16 tokens: attention holds 64 x 16^2 scores, a mask would hold 1024^2."""
    model = build(ARCHITECTURES["llama"])
    choose_layout(model, FP32)
    rows = MemoryRows(count=1)
    row = rows.rows[0]._replace(
        input_ids=torch.randint(3, VOCABULARY, (1024,)).int().numpy(),
        labels=torch.randint(3, VOCABULARY, (1024,)).int().numpy(),
        segments=torch.full((64,), 16).int().numpy(),
    )
    batch = collate([row], pad_token_id=None)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        objective(model, FP32).evaluate(batch)
    largest = max(event.self_cpu_memory_usage for event in profile.events() if event.count == 1)
    assert largest < 1024 * 1024  # one byte for each entry of such a mask


def test_a_layer_without_lengths_is_an_error_not_one_long_segment() -> None:
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(SegmentsUnsupported, match="lengths"):
        segment_attention(torch.nn.Identity(), x, x, x, None)
    with pytest.raises(SegmentsUnsupported, match="mask"):
        segment_attention(torch.nn.Identity(), x, x, x, torch.ones(6, 6), segment_lengths=(6,))


def test_what_attention_reads_is_brought_into_the_format_of_autocast() -> None:
    query, value = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8).bfloat16()
    assert [x.dtype for x in in_compute_format(query, value)] == [torch.float32, torch.bfloat16]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [x.dtype for x in in_compute_format(query, query, value)] == [torch.bfloat16] * 3


@pytest.mark.parametrize("longest", [75, 512])
def test_never_slower_than_padding(longest: int) -> None:
    """8 rows of one length, where padding wastes nothing: alternating, median of five, one thread."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).train()
    assert not choose_layout(model, FP32).padded
    loss = objective(model, FP32)
    ids = torch.randint(0, 256, (longest,)).int().numpy()
    row = MemoryRows(count=1).rows[0]._replace(input_ids=ids, labels=ids, segments=torch.tensor([longest]).numpy())
    batches = {SEGMENTS: collate([row] * 8, pad_token_id=None), "sdpa": collate([row] * 8, pad_token_id=0)}
    seconds: dict[str, list[float]] = {SEGMENTS: [], "sdpa": []}
    for _ in range(5 if longest > 100 else 9):
        for attention, batch in batches.items():
            model.set_attn_implementation(attention)
            began = time.process_time()
            loss.backward(batch, 8 * (longest - 1))
            seconds[attention].append(time.process_time() - began)
    ratio = statistics.median(seconds[SEGMENTS][1:]) / statistics.median(seconds["sdpa"][1:])
    print(f"8 x {longest} tokens: end to end takes {ratio:.2f} of the padded time")
    assert ratio < 1.25
