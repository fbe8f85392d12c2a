"""Loading models: from a folder, as a shape, and what is said when they are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunefleet.errors import Refused
from tunefleet.model_settings import ModelSettings
from tunefleet.models import check_weights, load_model, load_tokenizer, meta_model, model_shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def settings(name: object, **keys: Any) -> ModelSettings:
    return ModelSettings(model_name_or_path=str(name), **keys)


def test_weights_come_in_their_own_format_and_frequencies_in_fp32(folder: Path) -> None:
    model = load_model(settings(folder))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in load_model(settings(folder), torch.float32).parameters()} == {torch.float32}
    assert load_model(settings(folder, flash_attn="disabled")).config._attn_implementation == "eager"


def test_the_shape_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = meta_model(settings(tmp_path))
    assert all(p.is_meta for p in model.parameters())
    shape = model_shape(model)
    assert shape == model_shape(load_model(settings(folder)))
    assert (shape.architecture, shape.vocab_size, shape.hidden_size, shape.layers) == ("LlamaForCausalLM", 50, 16, 2)
    assert shape.total == sum(p.numel() for p in model.parameters())  # tied: the head counts once
    with pytest.raises(Refused, match="cannot be loaded"):
        load_model(settings(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_one_sentence(name: str) -> None:
    for load in (load_model, meta_model, load_tokenizer):
        with pytest.raises(Refused, match="is no folder") as refusal:
            load(settings(name))
        assert "\n" not in str(refusal.value)


def test_a_folder_without_a_config_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no config\.json"):
        load_model(settings(tmp_path))


def test_damaged_weights_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(Refused, match="cannot be loaded") as refusal:
        load_model(settings(tmp_path))
    assert "\n" not in str(refusal.value)


def test_weights_are_seen_to_be_whole_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    check_weights(settings(folder))
    check_weights(settings("someone/somewhere"))  # a name on the hub
    with pytest.raises(Refused, match="holds no weights"):
        check_weights(settings(tmp_path))
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match=r"model\.safetensors are damaged \(.*\): copy or download them again"):
        check_weights(settings(tmp_path))


def test_remote_code_runs_only_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}'
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(Refused, match="trust_remote_code: true"):
        meta_model(settings(tmp_path))
    assert not (tmp_path / "ran").exists()
