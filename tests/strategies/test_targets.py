"""Names resolve on the structure of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.targets import anatomy, is_linear, lora_targets, outside_modules

Call = Callable[..., Any]

ROOTS = {"llama": "model.layers", "qwen2_tied": "model.layers", "gpt2": "transformer.h", "moe": "model.layers"}
PER_LAYER = {"llama": 7, "qwen2_tied": 7, "gpt2": 4, "moe": 4}
OUTSIDE = {
    "llama": ("model.embed_tokens", "model.norm", "lm_head"),
    "qwen2_tied": ("model.embed_tokens", "model.norm", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
    "moe": ("model.embed_tokens", "model.norm", "lm_head"),
}


@pytest.mark.parametrize("meta", [False, True])
def test_parts_of_each_architecture(architecture: str, build: Call, meta: bool) -> None:
    model = build(architecture, meta=meta)
    parts = anatomy(model)
    root = ROOTS[architecture]
    assert parts.layers == tuple(f"{root}.{i}" for i in range(3))
    assert len(parts.linears) == 3 * PER_LAYER[architecture]
    assert all(path.startswith(f"{root}.") and is_linear(model.get_submodule(path)) for path in parts.linears)
    assert parts.outside == OUTSIDE[architecture]
    assert len(parts.fused) == (6 if architecture == "moe" else 0)
    tied = {"qwen2_tied": "model.embed_tokens", "gpt2": "transformer.wte"}.get(architecture)
    assert (parts.tied.embedding if parts.tied else None) == tied


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert() for _ in range(5)])
        self.norm = nn.LayerNorm(4)


class Tower(nn.Module):
    """A model with numbered experts, and a smaller second list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
        self.blocks = nn.ModuleList([Layer() for _ in range(2)])
        self.norm = nn.LayerNorm(4)


def test_numbered_experts_are_not_layers() -> None:
    parts = anatomy(Tower())
    assert parts.layers == ("blocks.0", "blocks.1")
    assert len(parts.linears) == 10


def test_a_lone_layer_of_nothing_but_experts_is_the_layer() -> None:
    layer = nn.ModuleDict({"experts": nn.ModuleList([Expert(), Expert()])})
    assert anatomy(nn.ModuleDict({"layers": nn.ModuleList([layer])})).layers == ("layers.0",)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(StrategyError, match=r"keeps its layers in no nn.ModuleList"):
        anatomy(nn.Sequential(nn.Linear(2, 2)))


def test_all_is_every_linear_in_the_layers_and_never_the_head(architecture: str, build: Call) -> None:
    parts = anatomy(build(architecture))
    targets = lora_targets(parts, ("all",))
    assert targets.modules == parts.linears
    assert targets.parameters == parts.fused
    assert not set(targets.modules) & set(parts.heads)


def test_names_match_whole_pieces_of_a_path(build: Call) -> None:
    parts = anatomy(build("llama"))
    assert lora_targets(parts, ("q_proj",)).modules == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))
    assert lora_targets(parts, ("layers.1.mlp.up_proj",)).modules == ("model.layers.1.mlp.up_proj",)
    assert lora_targets(parts, ("lm_head", "embed_tokens")).modules == ("model.embed_tokens", "lm_head")
    with pytest.raises(StrategyError, match="`proj` matches no linear layer or embedding"):
        lora_targets(parts, ("proj",))


def test_a_near_name_is_suggested_and_others_are_listed(build: Call) -> None:
    parts = anatomy(build("llama"))
    with pytest.raises(StrategyError, match="did you mean `q_proj`"):
        lora_targets(parts, ("q_poj",))
    with pytest.raises(StrategyError, match=r"choose from all, q_proj, k_proj, .*lm_head"):
        lora_targets(parts, ("zzz",))


def test_outside_names_are_exact(build: Call) -> None:
    parts = anatomy(build("llama"))
    assert outside_modules(parts, ("norm", "lm_head"), "key") == ("model.norm", "lm_head")
    with pytest.raises(StrategyError, match="key: `input_layernorm` matches no module outside the layers"):
        outside_modules(parts, ("input_layernorm",), "key")


@pytest.mark.parametrize(("name", "embedding"), [("qwen2_tied", "embed_tokens"), ("gpt2", "wte")])
def test_a_tied_head_is_refused_naming_the_embedding(name: str, embedding: str, build: Call) -> None:
    with pytest.raises(StrategyError, match=f"name `{embedding}` instead"):
        outside_modules(anatomy(build(name)), ("lm_head",), "freeze_extra_modules")
