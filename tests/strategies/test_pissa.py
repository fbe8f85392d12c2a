"""PiSSA: the split, the resume, and the way back to the original base."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.lora import Lora
from tunefleet_strategies.pissa import converted_config, factorise, factors

Call = Callable[..., Any]

VARIANTS = {
    "plain": {},
    "exact": {"pissa_iter": -1},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora_rslora": {"use_dora": True, "use_rslora": True, "lora_alpha": 3},
}


def pissa(**keys: object) -> Lora:
    return Lora.model_validate({"lora_rank": 4, "pissa_init": True, **keys})


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS.keys())
def test_converted_adapter_on_the_original_base(
    architecture: str, keys: dict[str, Any], build: Call, attach: Call, train: Call, logits: Call, tmp_path: Path
) -> None:
    settings = pissa(**keys)
    model = attach(settings, build(architecture))
    initial = settings.initial_state(model)
    train(settings, model, learning_rate=2e-3)
    settings.export(model, tmp_path, initial)
    expected = logits(model)
    assert not torch.allclose(expected, logits(build(architecture)), atol=1e-3)
    loaded = PeftModel.from_pretrained(build(architecture), tmp_path)
    config = loaded.peft_config["default"]
    assert isinstance(config, LoraConfig)
    grow = math.sqrt(2) if settings.use_rslora else 2
    assert (config.r, config.init_lora_weights) == (8, True)
    assert config.lora_alpha == pytest.approx(settings.alpha * grow)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("formats", ["autocast", "pure_bf16"])
@pytest.mark.parametrize("keys", [{}, {"use_dora": True}])
def test_converted_adapter_in_bf16(
    formats: str,
    keys: dict[str, Any],
    build: Call,
    attach: Call,
    tokens: torch.Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Logits within 2e-2 of their range (exactness.md D4): the residual is rounded to bf16."""
    precision = request.getfixturevalue(formats)
    settings = pissa(**keys)
    base = build("llama").to(torch.bfloat16)
    model = attach(settings, base, precision=precision)
    initial = settings.initial_state(model)
    with torch.no_grad():
        for name, value in factors(model).items():
            value.mul_(1.1 if "lora_B" in name else 0.97)
    settings.export(model, tmp_path, initial)
    loaded = PeftModel.from_pretrained(build("llama").to(torch.bfloat16), tmp_path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.eval()(input_ids=tokens).logits.float()
        actual = loaded.eval()(input_ids=tokens).logits.float()
    assert float((actual - expected).abs().max()) <= 2e-2 * float(expected.max() - expected.min())


def test_additional_target_and_magnitudes_come_along(
    build: Call, attach: Call, train: Call, logits: Call, tmp_path: Path
) -> None:
    settings = pissa(use_dora=True, additional_target="lm_head,norm")
    model = attach(settings, build("llama"))
    initial = settings.initial_state(model)
    train(settings, model)
    settings.export(model, tmp_path, initial)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(build("llama"), tmp_path)), logits(model), rtol=0, atol=1e-5
    )


def test_trained_and_initial_factors_are_kept_unless_converted_only(
    build: Call, attach: Call, train: Call, tmp_path: Path
) -> None:
    for convert in (False, True):
        settings = pissa(pissa_convert=convert)
        model = attach(settings, build("llama"))
        initial = settings.initial_state(model)
        train(settings, model)
        folder = tmp_path / str(convert)
        folder.mkdir()
        settings.export(model, folder, initial)
        assert (folder / "adapter_model.safetensors").exists()
        assert (folder / "pissa_adapter").exists() is not convert
        assert (folder / "pissa_initial").exists() is not convert
    kept = load_file(tmp_path / "False" / "pissa_initial" / "adapter_model.safetensors")
    assert kept.keys() == initial.keys()
    assert all(torch.equal(kept[name], initial[name]) for name in kept)
    trained = load_file(tmp_path / "False" / "pissa_adapter" / "adapter_model.safetensors")
    assert all(torch.equal(trained[name], value) for name, value in factors(model).items())


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("formats", ["fp32", "autocast", "pure_bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_resume_takes_the_first_factors_and_the_same_residual(
    name: str,
    keys: dict[str, Any],
    formats: str,
    build: Call,
    attach: Call,
    train: Call,
    request: pytest.FixtureRequest,
) -> None:
    precision = request.getfixturevalue(formats)
    settings = pissa(**keys)
    first = attach(settings, build(name), precision=precision)
    begun = {key: p.detach().clone() for key, p in first.named_parameters()}
    initial = settings.initial_state(first)
    if formats == "fp32":
        train(settings, first)
    # The state went through storage, and another seed must not matter any more.
    stored = {key: value.clone() for key, value in initial.items()}
    again = attach(settings, build(name), precision=precision, seed=99, initial=stored)
    for key, p in again.named_parameters():
        assert p.dtype == begun[key].dtype, key
        assert torch.equal(p, begun[key]), key
    assert all(torch.equal(initial[key], value) for key, value in settings.initial_state(again).items())


def test_initial_state_is_a_copy(build: Call, attach: Call, train: Call) -> None:
    settings = pissa()
    model = attach(settings, build("llama"))
    initial = settings.initial_state(model)
    before = {name: value.clone() for name, value in initial.items()}
    train(settings, model)
    assert all(torch.equal(initial[name], before[name]) for name in initial)
    assert Lora().initial_state(attach(Lora(), build("llama"))) == {}


def test_only_the_source_factorises(build: Call, attach: Call) -> None:
    settings = pissa()
    base = build("llama")
    other = attach(settings, build("llama"), is_source=False)
    assert all(not value.any() for value in factors(other).values())
    weight = other.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight
    assert torch.equal(weight, base.model.layers[0].mlp.up_proj.weight)
    source = attach(settings, build("llama"))
    assert all(value.any() for value in factors(source).values())
    shapes = [(name, p.shape, p.dtype) for name, p in source.named_parameters()]
    assert [(name, p.shape, p.dtype) for name, p in other.named_parameters()] == shapes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_exact_split_is_pefts(name: str, dora: bool, build: Call, attach: Call) -> None:
    ours = attach(pissa(pissa_iter=-1, use_dora=dora), build(name))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        use_dora=dora,
        init_lora_weights="pissa",
        target_modules=ours.peft_config["default"].target_modules,
        fan_in_fan_out=name == "gpt2",
    )
    theirs = dict(get_peft_model(build(name), config).named_parameters())
    for parameter_name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs[parameter_name], rtol=0, atol=1e-5)


def test_the_randomised_split_is_nearly_the_best() -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.8 ** torch.arange(32.0))
    best = torch.linalg.svdvals(weight)[8:].norm()
    for iterations in (-1, 16):
        a, b = factorise(weight, 8, iterations, scale=2.0)
        assert (a.shape, b.shape) == ((8, 32), (48, 8))
        assert float((weight - 2.0 * b @ a).norm()) <= 1.0001 * float(best)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_grow_as_the_rank_does(rslora: bool) -> None:
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})
    converted = converted_config(config)
    assert converted.r == 8
    assert converted.rank_pattern == {"q_proj": 4}

    def scale(alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if rslora else rank)

    assert scale(converted.lora_alpha, 8) == pytest.approx(scale(8, 4))
    assert converted.alpha_pattern is not None
    assert scale(converted.alpha_pattern["q_proj"], 4) == pytest.approx(scale(6, 2))


def test_missing_or_foreign_initial_factors_are_refused(build: Call, attach: Call, tmp_path: Path) -> None:
    settings = pissa()
    model = attach(settings, build("llama"))
    with pytest.raises(StrategyError, match="pass what initial_state returned"):
        settings.export(model, tmp_path, {})
    with pytest.raises(StrategyError, match="resume with the model and settings"):
        attach(pissa(lora_rank=2), build("llama"), initial=settings.initial_state(model))


def test_pissa_on_merged_adapters(build: Call, attach: Call, train: Call, logits: Call, tmp_path: Path) -> None:
    """A new PiSSA adapter on base plus first: the converted one fits exactly that, and the chain says so."""
    build("llama").save_pretrained(tmp_path / "base")
    first = Lora(lora_rank=2)
    model = attach(first, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    train(first, model)
    (tmp_path / "first").mkdir()
    first.export(model, tmp_path / "first", {})
    settings = pissa(adapter_name_or_path=str(tmp_path / "first"), create_new_adapter=True)
    model = attach(settings, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    initial = settings.initial_state(model)
    train(settings, model)
    (tmp_path / "second").mkdir()
    settings.export(model, tmp_path / "second", initial)
    assert (tmp_path / "second" / "tunefleet_chain.json").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base = PeftModel.from_pretrained(base, tmp_path / "first").merge_and_unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "second")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
