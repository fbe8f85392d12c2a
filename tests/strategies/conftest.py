"""Four tiny random models, one of each shape that a method must cope with."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tunefleet_strategies.contract import AttachContext, OptimizerSpec, Precision, Strategy

VOCABULARY = 64
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}

ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], Callable[[], PretrainedConfig]]] = {
    "llama": (
        LlamaForCausalLM,
        lambda: LlamaConfig(**COMMON, **WIDTHS, num_hidden_layers=3, tie_word_embeddings=False),
    ),
    "qwen2_tied": (
        Qwen2ForCausalLM,
        lambda: Qwen2Config(**COMMON, **WIDTHS, num_hidden_layers=3, tie_word_embeddings=True),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(
            **COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
        ),
    ),
    "moe": (
        Qwen3MoeForCausalLM,
        lambda: Qwen3MoeConfig(
            **COMMON,
            **WIDTHS,
            num_hidden_layers=3,
            **EXPERTS,
            tie_word_embeddings=False,
        ),
    ),
}

FP32 = Precision(compute=torch.float32, trainable=torch.float32, frozen=torch.float32)
AUTOCAST = Precision(compute=torch.bfloat16, trainable=torch.float32, frozen=torch.bfloat16)
PURE_BF16 = Precision(compute=torch.bfloat16, trainable=torch.bfloat16, frozen=torch.bfloat16)

Build = Callable[..., PreTrainedModel]
Attach = Callable[..., torch.nn.Module]
Train = Callable[..., list[float]]


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each architecture in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def build() -> Build:
    """Make a model with the same random weights every time; on meta tensors where asked."""

    @cache
    def first(architecture: str, meta: bool) -> PreTrainedModel:
        model_class, config = ARCHITECTURES[architecture]
        with torch.random.fork_rng():
            torch.manual_seed(7)
            with torch.device("meta" if meta else "cpu"):
                model = model_class(config())
            if not meta:
                # Norms and biases start at one and zero; others tell a moved parameter from a lost one.
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.data += 0.05 * torch.randn_like(parameter)
                    else:
                        parameter.data *= 4.0
        return model.eval()

    def make(architecture: str, meta: bool = False) -> PreTrainedModel:
        return deepcopy(first(architecture, meta))

    return make


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Two rows of twelve tokens."""
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def attach() -> Attach:
    def run(
        strategy: Strategy,
        model: torch.nn.Module,
        precision: Precision = FP32,
        seed: int = 1,
        is_source: bool = True,
        initial: dict[str, torch.Tensor] | None = None,
    ) -> torch.nn.Module:
        return strategy.attach(model, AttachContext(precision, seed, is_source, initial))

    return run


@pytest.fixture(scope="session")
def train(tokens: torch.Tensor) -> Train:
    """Take a few steps on one batch and give back the losses."""

    def run(strategy: Strategy, model: torch.nn.Module, steps: int = 3, learning_rate: float = 1e-2) -> list[float]:
        optimizer = strategy.optimizer(model, OptimizerSpec("adamw_torch", learning_rate, weight_decay=0.01))
        model.train()
        losses = []
        for _ in range(steps):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        model.eval()
        return losses

    return run


@pytest.fixture(scope="session")
def logits(tokens: torch.Tensor) -> Callable[[torch.nn.Module], torch.Tensor]:
    def run(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=tokens).logits.float()

    return run


@pytest.fixture(scope="session")
def fp32() -> Precision:
    return FP32


@pytest.fixture(scope="session")
def autocast() -> Precision:
    return AUTOCAST


@pytest.fixture(scope="session")
def pure_bf16() -> Precision:
    return PURE_BF16
