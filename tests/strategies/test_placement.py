"""Where adapters go, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.lora import Lora

Call = Callable[..., Any]


def lora(**keys: object) -> Lora:
    return Lora.model_validate({"lora_rank": 4, **keys})


@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("llama", {"lora_target": "q_poj"}, "did you mean `q_proj`"),
        ("llama", {"lora_target": "self_attn"}, "matches no linear layer"),
        ("llama", {"additional_target": "lm_heat"}, "did you mean `lm_head`"),
        ("llama", {"lora_target": "lm_head,q_proj", "additional_target": "lm_head"}, "both name lm_head"),
        ("llama", {"lora_target": "embed_tokens", "pissa_init": True}, "is an embedding, which PiSSA does not split"),
        ("llama", {"pissa_init": True, "lora_rank": 17}, "lora_rank 17 exceeds the smaller side 16 of .*k_proj"),
        ("qwen2_tied", {"lora_target": "embed_tokens"}, "name `embed_tokens` in additional_target"),
        ("qwen2_tied", {"lora_target": "lm_head"}, "name `embed_tokens` in additional_target"),
        ("qwen2_tied", {"additional_target": "lm_head"}, "name `embed_tokens` instead, which trains both"),
        ("gpt2", {"additional_target": "wte"}, "use finetuning_type: freeze with freeze_extra_modules: wte"),
        ("gpt2", {"additional_target": "lm_head"}, "use finetuning_type: freeze"),
        ("moe", {"lora_target": "gate_up_proj", "lora_dropout": 0.1}, "fused experts, which take plain LoRA"),
        ("moe", {"lora_target": "experts.down_proj", "use_dora": True}, "fused experts, which take plain LoRA"),
        ("moe", {"lora_target": "down_proj", "pissa_init": True}, "fused experts, which take plain LoRA"),
    ],
)
@pytest.mark.parametrize("meta", [False, True])
def test_refusals_also_before_weights_are_loaded(
    name: str, keys: dict[str, Any], reason: str, meta: bool, build: Call, attach: Call
) -> None:
    with pytest.raises(StrategyError, match=reason):
        attach(lora(**keys), build(name, meta=meta))


@pytest.mark.parametrize("target", ["gate_up_proj", "experts.gate_up_proj", "layers.1.mlp.experts.down_proj"])
def test_fused_experts_by_name(target: str, build: Call, attach: Call, train: Call) -> None:
    settings = lora(lora_target=target)
    model = attach(settings, build("moe"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == (2 if "layers.1" in target else 6)
    assert all(".experts." in name for name in trained)
    losses = train(settings, model, steps=4)
    assert losses[-1] < losses[0]


def test_additional_target_trains_a_copy_and_nothing_that_ends_alike(
    build: Call, attach: Call, train: Call, logits: Call, tmp_path: Path
) -> None:
    settings = lora(additional_target="norm,lm_head")
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = attach(settings, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert whole == {
        "base_model.model.model.norm.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    }
    train(settings, model)
    assert torch.equal(model.get_base_model().lm_head.original_module.weight, base.lm_head.weight)
    (tmp_path / "adapter").mkdir()
    settings.export(model, tmp_path / "adapter", {})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", ["embed_tokens", "embed_tokens,lm_head"])
def test_tied_embeddings_train_as_one_and_stay_tied(
    names: str, build: Call, attach: Call, train: Call, logits: Call, tmp_path: Path
) -> None:
    settings = lora(additional_target=names)
    build("qwen2_tied").save_pretrained(tmp_path / "base")
    model = attach(settings, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    base = model.get_base_model()
    embedding = base.model.embed_tokens.modules_to_save["default"].weight
    assert embedding is base.lm_head.modules_to_save["default"].weight
    before = embedding.detach().clone()
    train(settings, model)
    assert not torch.equal(embedding, before)
    (tmp_path / "adapter").mkdir()
    settings.export(model, tmp_path / "adapter", {})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(whole), logits(model), rtol=0, atol=1e-5)


def test_all_passes_over_what_trains_whole(build: Call, attach: Call) -> None:
    model = attach(lora(additional_target="layers.1.mlp"), build("llama"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".layers.1.mlp." in name]
    assert trained
    assert all(".modules_to_save." in name for name in trained)


def test_names_are_short_where_short_means_the_same(build: Call, attach: Call) -> None:
    config = attach(lora(lora_target="q_proj,layers.0.mlp.up_proj"), build("llama")).peft_config["default"]
    assert "model.layers.0.mlp.up_proj" in config.target_modules
    config = attach(lora(lora_target="q_proj"), build("llama")).peft_config["default"]
    assert config.target_modules == {"q_proj"}
