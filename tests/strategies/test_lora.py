"""LoRA, rsLoRA, DoRA: what trains, what it computes, what it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from tunefleet_strategies.adapters import adapter_layers
from tunefleet_strategies.contract import LogUniform, Precision
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.lora import Lora
from tunefleet_strategies.targets import anatomy

Call = Callable[..., Any]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "dora": {"use_dora": True},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.1},
    "dropout": {"lora_dropout": 0.2},
    "pissa": {"pissa_init": True},
    "pissa_dora_rslora": {"pissa_init": True, "use_dora": True, "use_rslora": True, "lora_alpha": 4},
}


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> Lora:
    return Lora.model_validate({"lora_rank": 4, **VARIANTS[str(request.param)]})


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_only_factors_train_and_nothing_frozen_moves(
    architecture: str, variant: Lora, build: Call, attach: Call, train: Call
) -> None:
    model = attach(variant, build(architecture))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(variant, model, steps=5)
    assert variant.lora_dropout > 0 or losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained(model))
    assert all(".lora_" in name for name in moved)


def test_a_new_adapter_changes_nothing_yet(
    architecture: str, variant: Lora, build: Call, attach: Call, logits: Call
) -> None:
    expected = logits(build(architecture))
    torch.testing.assert_close(logits(attach(variant, build(architecture))), expected, rtol=0, atol=2e-5)


def test_attach_is_a_function_of_the_seed_and_leaves_the_global_state(
    architecture: str, variant: Lora, build: Call, attach: Call
) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = attach(variant, build(architecture), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = attach(variant, build(architecture), seed=5), attach(variant, build(architecture), seed=6)
    for (name, p), (_, q) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    if not variant.pissa_init:
        assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))


def test_meta_tensors_give_the_same_shapes(architecture: str, variant: Lora, build: Call, attach: Call) -> None:
    real, meta = attach(variant, build(architecture)), attach(variant, build(architecture, meta=True))
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    shapes = [(name, p.shape, p.dtype, p.requires_grad) for name, p in real.named_parameters()]
    assert [(name, p.shape, p.dtype, p.requires_grad) for name, p in meta.named_parameters()] == shapes
    assert variant.notices(meta) == variant.notices(real)


def test_a_plan_takes_no_memory_for_factors_that_only_workers_shall_have(build: Call, attach: Call) -> None:
    """A terabyte for the first of them."""
    planned = attach(Lora(lora_rank=4_000_000_000), build("llama", meta=True))
    assert sum(p.nbytes for p in planned.parameters()) > 10**12


def test_merged_logits_equal_base_plus_adapter(
    architecture: str, build: Call, attach: Call, train: Call, logits: Call, tmp_path: Path
) -> None:
    settings = Lora(lora_rank=4)
    base = build(architecture)
    base.save_pretrained(tmp_path / "base")
    model = attach(settings, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    train(settings, model)
    expected = logits(model)
    (tmp_path / "adapter").mkdir()
    settings.export(model, tmp_path / "adapter", {})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_all_adapts_the_fused_experts(build: Call, attach: Call) -> None:
    model = attach(Lora(lora_rank=2), build("moe"))
    experts = [p for name, p in trained(model).items() if ".experts." in name]
    # gate_up (5 x 32 x 32) and down (5 x 32 x 16) of three layers: A (5 r x n) and B (m x 5 r)
    assert sum(p.numel() for p in experts) == 3 * 2 * 5 * ((32 + 32) + (32 + 16))


def test_rank_scale_and_size(build: Call, attach: Call) -> None:
    settings = Lora(lora_rank=16, use_rslora=True)
    assert (settings.alpha, settings.scale) == (32, 2 * math.sqrt(16))
    assert Lora(lora_rank=16, lora_alpha=0).scale == 2
    layers = adapter_layers(attach(settings, build("llama")))
    assert {layer.scaling["default"] for _, layer in layers} == {8.0}
    assert [path for path, _ in layers] == list(anatomy(build("llama")).linears)


def one_pass(model: torch.nn.Module, tokens: torch.Tensor, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the gradient of all factors laid end to end, with factors B that are not zero."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
            if "magnitude" in name:
                parameter.copy_(parameter.bfloat16())
    torch.manual_seed(0)  # dropout falls on the same entries
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.train()(input_ids=tokens, labels=tokens)
    out.loss.backward()
    gradients = [p.grad for p in trained(model).values() if p.grad is not None]
    assert len(gradients) == len(trained(model))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    return out.logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "gpt2"])
@pytest.mark.parametrize(
    "keys", [{}, {"use_dora": True}, {"lora_dropout": 0.3}, {"use_dora": True, "lora_dropout": 0.3}]
)
def test_without_input_copies_as_near_to_fp32_as_peft(
    name: str,
    keys: dict[str, Any],
    build: Call,
    attach: Call,
    fp32: Precision,
    autocast: Precision,
    tokens: torch.Tensor,
) -> None:
    """Under bf16 autocast PEFT's format and, beside the fp32 result, PEFT's error; plain LoRA bit by bit."""
    settings = Lora.model_validate({"lora_rank": 4, **keys})
    ours, theirs, exact = (
        attach(settings, build(name).bfloat16().float(), precision=precision)
        for precision in (autocast, autocast, fp32)
    )
    for _, layer in adapter_layers(theirs):
        layer.cast_input_dtype_enabled = True
    results = one_pass(ours, tokens, True), one_pass(theirs, tokens, True), one_pass(exact, tokens, False)
    assert results[0][0].dtype == results[1][0].dtype
    for own, peft, true in zip(*results, strict=True):
        error, peft_error = (float((value - true).norm() / true.norm()) for value in (own, peft))
        assert error <= 1.2 * peft_error + 5e-3
        if not keys:
            assert torch.equal(own, peft)


def test_inputs_are_not_kept_twice(build: Call, attach: Call, autocast: Precision, tokens: torch.Tensor) -> None:
    """What the backward pass keeps is counted: PEFT's default keeps an fp32 copy of every input."""

    def kept(copies: bool) -> int:
        model = attach(Lora(lora_rank=4), build("llama"), precision=autocast).train()
        if copies:
            for _, layer in adapter_layers(model):
                layer.cast_input_dtype_enabled = True
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(input_ids=tokens, labels=tokens).loss
        assert loss.requires_grad
        return sum(storages.values())

    assert kept(copies=False) < 0.9 * kept(copies=True)


def test_formats(build: Call, attach: Call, autocast: Precision, pure_bf16: Precision) -> None:
    settings = Lora(lora_rank=4, use_dora=True, additional_target=("lm_head",))
    model = attach(settings, build("llama"), precision=autocast)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    model = attach(settings, build("llama"), precision=pure_bf16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "without an fp32 copy" in settings.notices(model)[0]


def test_as_peft_by_hand(build: Call, attach: Call, train: Call) -> None:
    """The same modules, the same start, the same losses as PEFT with the same configuration."""
    settings = Lora(lora_rank=4, lora_alpha=12, lora_target=("q_proj", "down_proj"))
    ours = attach(settings, build("llama"), seed=9)
    torch.manual_seed(9)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(build("llama"), config)
    for (name, p), (their_name, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name
        assert torch.equal(p, q)
        assert p.requires_grad == q.requires_grad
    assert train(settings, ours) == train(settings, theirs)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"lora_rank": 0}, "greater than or equal to 1"),
        ({"lora_dropout": 1.0}, "less than 1"),
        ({"loraplus_lr_ratio": 0}, "greater than 0"),
        ({"pissa_iter": -2}, "greater than or equal to -1"),
        ({"pissa_convert": True}, "set pissa_init: true"),
        ({"pissa_init": True, "adapter_name_or_path": "a"}, "set create_new_adapter: true"),
        ({"lora_rnk": 4}, "Extra inputs"),
    ],
)
def test_settings_that_mean_nothing_are_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Lora.model_validate(keys)


def test_search_space_with_a_scale_that_would_move_is_refused() -> None:
    assert isinstance(Lora().search_space()["learning_rate"], LogUniform)
    assert "lora_rank" in Lora(use_rslora=True, lora_alpha=16).search_space()
    with pytest.raises(StrategyError, match="set lora_alpha"):
        Lora(use_rslora=True).search_space()


def test_traits_say_what_needs_whole_weights() -> None:
    assert "zero3" in Lora().traits().shardings
    assert not Lora().traits().trains_base
    assert "zero3" in Lora(pissa_init=True).traits().shardings  # it gathers one matrix at a time there
    assert "fsdp2" not in Lora(pissa_init=True).traits().shardings
    assert "zero3" not in Lora(adapter_name_or_path=("a", "b")).traits().shardings


def test_a_model_without_an_adapter_is_refused(build: Call, tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match="pass the model that attach returned"):
        Lora().export(build("llama"), tmp_path, {})


def test_a_model_that_is_no_transformers_model_is_refused(attach: Call) -> None:
    with pytest.raises(StrategyError, match="is no transformers model"):
        attach(Lora(), torch.nn.Linear(2, 2))
