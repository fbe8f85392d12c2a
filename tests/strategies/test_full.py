"""Full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tunefleet_strategies.contract import Precision
from tunefleet_strategies.full import Full

Call = Callable[..., Any]


def test_everything_trains_and_the_loss_falls(architecture: str, build: Call, attach: Call, train: Call) -> None:
    model = attach(Full(), build(architecture))
    assert all(p.requires_grad for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(Full(), model, steps=4)
    assert losses[-1] < losses[0]
    # An expert that no token chose has no gradient; decay moves its matrix all the same.
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_number_formats(build: Call, attach: Call, pure_bf16: Precision) -> None:
    model = attach(Full(), build("llama"), precision=pure_bf16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert "without an fp32 copy (and AdamW's moments are bf16 too" in Full().notices(model)[0]
    assert Full().notices(attach(Full(), build("llama"))) == []


def test_export_loads_without_us(
    architecture: str, build: Call, attach: Call, train: Call, logits: Call, tmp_path: Path
) -> None:
    model = attach(Full(), build(architecture))
    train(Full(), model)
    Full().export(model, tmp_path, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
