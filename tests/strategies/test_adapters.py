"""Several adapters in a row."""

from __future__ import annotations

import json
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


@pytest.fixture
def row(architecture: str, build: Call, attach: Call, train: Call, tmp_path: Path) -> tuple[Call, str, str]:
    """A base on disk and two adapters, the second trained on base plus first."""
    build(architecture).save_pretrained(tmp_path / "base")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    for name, keys in {"first": {}, "second": {"adapter_name_or_path": str(tmp_path / "first")}}.items():
        settings = Lora.model_validate({"lora_rank": 4, "create_new_adapter": True, **keys})
        model = attach(settings, load(), seed=len(name))
        train(settings, model)
        (tmp_path / name).mkdir()
        settings.export(model, tmp_path / name, {})
    return load, str(tmp_path / "first"), str(tmp_path / "second")


def by_hand(model: Any, *paths: str) -> Any:
    """Base plus adapters, with PEFT alone."""
    for path in paths:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return model


def test_all_but_the_last_are_merged_and_the_last_continues(
    row: tuple[Call, str, str], attach: Call, train: Call, logits: Call, tmp_path: Path
) -> None:
    load, first, second = row
    settings = Lora.model_validate({"lora_rank": 4, "adapter_name_or_path": f"{first},{second}"})
    model = attach(settings, load())
    theirs = PeftModel.from_pretrained(by_hand(load(), first), second, is_trainable=True)
    for (name, p), (their_name, q) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad, name
    assert train(settings, model) == train(settings, theirs)
    out = tmp_path / "out"
    out.mkdir()
    settings.export(model, out, {})
    assert json.loads((out / "tunefleet_chain.json").read_text()) == {
        "base": str(tmp_path / "base"),
        "adapters": [first],
    }
    torch.testing.assert_close(logits(by_hand(load(), first, str(out))), logits(model), rtol=0, atol=1e-5)


def test_all_are_merged_and_a_new_one_is_made(
    row: tuple[Call, str, str], attach: Call, train: Call, logits: Call, tmp_path: Path
) -> None:
    load, first, second = row
    keys = {"lora_rank": 2, "adapter_name_or_path": [first, second], "create_new_adapter": True}
    settings = Lora.model_validate(keys)
    model = attach(settings, load())
    torch.testing.assert_close(logits(model), logits(by_hand(load(), first, second)), rtol=0, atol=1e-6)
    assert model.peft_config["default"].r == 2
    train(settings, model)
    out = tmp_path / "out"
    out.mkdir()
    settings.export(model, out, {})
    assert json.loads((out / "tunefleet_chain.json").read_text())["adapters"] == [first, second]
    torch.testing.assert_close(logits(by_hand(load(), first, second, str(out))), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_without_those_it_stands_on_is_refused(row: tuple[Call, str, str], attach: Call) -> None:
    load, _, second = row
    settings = Lora.model_validate({"adapter_name_or_path": second})
    with pytest.raises(StrategyError, match=r"was trained on its base plus .*first; write .*first,.*second"):
        attach(settings, load())


def test_meta_tensors_take_the_shapes_of_the_continued_adapter(
    row: tuple[Call, str, str], attach: Call, architecture: str, build: Call
) -> None:
    load, first, second = row
    settings = Lora.model_validate({"lora_rank": 16, "adapter_name_or_path": f"{first},{second}"})
    real, meta = attach(settings, load()), attach(settings, build(architecture, meta=True))
    shapes = [(name, p.shape, p.requires_grad) for name, p in real.named_parameters()]
    assert [(name, p.shape, p.requires_grad) for name, p in meta.named_parameters()] == shapes
    notices = settings.notices(meta)
    assert notices == settings.notices(real)
    assert "lora_rank 16 (adapter: 4)" in notices[0]
    assert "lora_alpha 32 (adapter: 8)" in notices[0]


def test_what_is_no_usable_adapter_is_refused(build: Call, attach: Call, tmp_path: Path) -> None:
    model = build("llama", meta=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StrategyError, match="holds no adapter"):
        attach(Lora(adapter_name_or_path=(str(tmp_path / "empty"),)), model)
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM"}))
    with pytest.raises(StrategyError, match="name a LoRA adapter"):
        attach(Lora(adapter_name_or_path=(str(tmp_path / "prompt"),)), model)


def test_continuing_pissa_factors_is_refused(build: Call, attach: Call, tmp_path: Path) -> None:
    settings = Lora(lora_rank=4, pissa_init=True)
    model = attach(settings, build("llama"))
    settings.export(model, tmp_path, settings.initial_state(model))
    with pytest.raises(StrategyError, match="name the converted adapter"):
        attach(Lora(adapter_name_or_path=(str(tmp_path / "pissa_adapter"),)), build("llama"))
    continued = attach(Lora(adapter_name_or_path=(str(tmp_path),)), build("llama"))
    assert continued.peft_config["default"].r == 8
