"""Weights read in parts: the same values as transformers loads, whatever the files call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.tiny import ARCHITECTURES, build
from transformers import AutoModelForCausalLM

from tunefleet.errors import Refused
from tunefleet.model_settings import ModelSettings
from tunefleet.models import empty_model
from tunefleet.weight_files import WeightFiles


def opened(folder: Path) -> WeightFiles:
    settings = ModelSettings(model_name_or_path=str(folder))
    files = WeightFiles(settings)
    files.fit(empty_model(settings, files.dtype))
    return files


def saved(architecture: str, folder: Path, **how: Any) -> Path:
    build(ARCHITECTURES[architecture]).save_pretrained(folder, **how)
    return folder


@pytest.mark.parametrize("pieces", ["one file", "many files"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_is_what_transformers_loads(architecture: str, pieces: str, tmp_path: Path) -> None:
    saved(architecture, tmp_path, max_shard_size="5GB" if pieces == "one file" else "8KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (pieces == "many files")
    files = opened(tmp_path)
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        cut = len(value) // 3
        assert torch.equal(files.rows(name, 0, cut), value[:cut]), name
        assert torch.equal(files.rows(name, cut, len(value)), value[cut:]), name
        assert torch.equal(files.rows(name, cut, cut), value[cut:cut]), name


def test_experts_lie_apart_on_disk(tmp_path: Path) -> None:
    """So the test above has seen tensors that are made of several."""
    saved("qwen3_moe", tmp_path)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in load_file(tmp_path / "model.safetensors")


def test_a_checkpoint_of_the_bare_decoder_has_other_prefixes(tmp_path: Path) -> None:
    """GPT-2's own weights are of this kind."""
    saved("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    stored = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    files = opened(tmp_path)
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(files.rows(name, 0, None), value), name


def test_an_empty_model_is_the_loaded_one_without_its_weights(tmp_path: Path) -> None:
    saved("qwen2_tied", tmp_path)
    settings = ModelSettings(model_name_or_path=str(tmp_path))
    files = WeightFiles(settings)
    empty, loaded = empty_model(settings, files.dtype), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in loaded.named_parameters()]
    for (name, buffer), (other, expected) in zip(empty.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, expected)
    assert not empty.training
    assert empty.generation_config == loaded.generation_config


@pytest.mark.parametrize(("dtype", "named"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_the_number_format_is_the_one_transformers_would_choose(dtype: str, named: bool, tmp_path: Path) -> None:
    model = build(ARCHITECTURES["llama"])
    torch.nn.Module.to(model, getattr(torch, dtype)).save_pretrained(tmp_path)
    if not named:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    settings = ModelSettings(model_name_or_path=str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert next(empty_model(settings, WeightFiles(settings).dtype).parameters()).dtype == loaded.dtype


def test_what_cannot_be_read_in_parts_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "q_proj" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"lack 2 tensors of the model, model\.layers\.0.*write sharding: none"):
        opened(tmp_path)
    save_file({k: v[:-1] if k == "lm_head.weight" else v for k, v in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"lm_head\.weight .* has shape \[66, 32\] on disk and \[67, 32\] in the model"):
        opened(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Refused, match=r"are damaged .* copy or download them again"):
        opened(tmp_path)
    file.unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(Refused, match=r"no weights in safetensors files.*write sharding: none"):
        opened(tmp_path)
