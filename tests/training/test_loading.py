"""Start values of a model that is read in parts: those of the same method on a model in memory, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.training.tiny import ARCHITECTURES, FP32, MIXED, PURE, build
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tunefleet.errors import Refused
from tunefleet.model_settings import ModelSettings
from tunefleet.training.engines.loading import Source
from tunefleet.training.engines.sharding import settle
from tunefleet_strategies.contract import AttachContext, Precision, Strategy
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora

CPU = torch.device("cpu")

FORMS: dict[str, tuple[Strategy, str]] = {
    "full": (Full(), "qwen3_moe"),
    "freeze": (Freeze(freeze_trainable_layers=1, freeze_extra_modules=("embed_tokens",)), "qwen2_tied"),
    "lora": (Lora(lora_rank=4), "qwen3_moe"),
    "dora": (Lora(lora_rank=4, use_dora=True), "gpt2"),
    "dora on embeddings": (Lora(lora_rank=4, use_dora=True, lora_target=("embed_tokens", "q_proj")), "llama"),
    "lora on the head": (Lora(lora_rank=4, lora_target=("lm_head", "q_proj")), "llama"),
    "whole modules too": (Lora(lora_rank=4, additional_target=("embed_tokens", "lm_head")), "llama"),
    "tied modules too": (Lora(lora_rank=4, additional_target=("embed_tokens",)), "qwen2_tied"),
}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_disk(architecture: str, folder: Path, dtype: torch.dtype) -> Path:
    nn.Module.to(build(ARCHITECTURES[architecture]), dtype).save_pretrained(folder)
    return folder


def both(strategy: Strategy, folder: Path, precision: Precision) -> tuple[nn.Module, nn.Module, Source]:
    """In memory, and read in parts."""
    context = AttachContext(precision, seed=5)
    whole = strategy.attach(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), context)
    source = Source.open(ModelSettings(model_name_or_path=str(folder)), strategy, context)
    return whole, source.sharded(CPU, checkpointed=False), source


def assert_alike(whole: nn.Module, shared: nn.Module) -> None:
    expected, got = dict(whole.named_parameters()), dict(shared.named_parameters())
    assert expected.keys() == got.keys()
    for name, parameter in got.items():
        assert isinstance(parameter, DTensor)
        assert parameter.requires_grad == expected[name].requires_grad, name
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(parameter.to_local(), expected[name]), name
    for (name, buffer), (other, twin) in zip(shared.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, twin)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32 file", "bf16 file"])
@pytest.mark.parametrize("precision", [FP32, MIXED, PURE], ids=["fp32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_start_values_are_those_of_a_model_in_memory(
    form: str, precision: Precision, stored: torch.dtype, tmp_path: Path
) -> None:
    strategy, architecture = FORMS[form]
    whole, shared, source = both(strategy, on_disk(architecture, tmp_path / "model", stored), precision)
    assert_alike(whole, shared)
    assert [(p.name, p.shape, p.trainable) for p in source.shape.parameters] == [
        (name, tuple(p.shape), p.requires_grad) for name, p in whole.named_parameters()
    ]


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_the_same(form: str, tmp_path: Path) -> None:
    strategy, architecture = FORMS[form]
    whole, shared, _ = both(strategy, on_disk(architecture, tmp_path / "model", torch.float32), FP32)
    settle(shared, FP32, CPU)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, got = whole.eval()(input_ids=ids).logits, shared.eval()(input_ids=ids).logits
    assert torch.allclose(expected, got, atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "dora", "whole modules too"])
def test_an_adapter_is_continued(form: str, tmp_path: Path) -> None:
    strategy, architecture = FORMS[form]
    folder = on_disk(architecture, tmp_path / "model", torch.float32)
    trained = strategy.attach(AutoModelForCausalLM.from_pretrained(folder), AttachContext(FP32, seed=9))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    (tmp_path / "adapter").mkdir()
    strategy.export(trained, tmp_path / "adapter", {})
    further = strategy.model_copy(update={"adapter_name_or_path": (str(tmp_path / "adapter"),)})
    whole, shared, _ = both(further, folder, FP32)
    assert_alike(whole, shared)
    assert any(torch.equal(p, trained.get_parameter(n)) for n, p in whole.named_parameters() if p.requires_grad)


def test_a_model_without_a_list_of_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = on_disk("llama", tmp_path / "model", torch.float32)
    source = Source.open(ModelSettings(model_name_or_path=str(folder)), Full(), AttachContext(FP32))
    monkeypatch.setattr(nn, "ModuleList", tuple)
    with pytest.raises(Refused, match=r"keeps its layers in no nn\.ModuleList.*write sharding: none"):
        source.sharded(CPU, checkpointed=False)
