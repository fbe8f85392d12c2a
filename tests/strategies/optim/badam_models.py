"""What the tests of BAdam's optimizers share: small models, batches without randomness, and a step by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.optim.block_adamw import Block

VOCABULARY = 64


def llama(layers: int = 3, hidden: int = 32, dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    """The same random Llama every time; its norms are not at one, so that decay shows on them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=hidden,
                intermediate_size=hidden + 16,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=False,
                **config,
            )
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def batches(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randint(3, VOCABULARY, (2, 10), generator=generator)


def backward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


def layer_blocks(model: LlamaForCausalLM) -> list[Block]:
    named = dict(model.named_parameters())
    labels = [f"model.layers.{number}" for number in range(model.config.num_hidden_layers)]
    return [Block(label, {name: p for name, p in named.items() if name.startswith(f"{label}.")}) for label in labels]


def one_group(blocks: Sequence[Block], decay: float = 0.0, learning_rate: float = 1e-2) -> list[dict[str, Any]]:
    parameters = [parameter for block in blocks for parameter in block.parameters.values()]
    return [{"params": parameters, "lr": learning_rate, "weight_decay": decay}]


def spec(learning_rate: float = 1e-2, eps: float = 1e-8, seed: int = 0) -> OptimizerSpec:
    return OptimizerSpec("adamw_torch", learning_rate, eps=eps, seed=seed)
