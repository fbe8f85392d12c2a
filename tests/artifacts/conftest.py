"""Tiny random models and a byte-level tokenizer, as folders on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config(name: str) -> PretrainedConfig:
    if name == "gpt2":
        return GPT2Config(
            vocab_size=262, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=256
        )
    tied = name == "llama-tied"
    return LlamaConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=256,  # Llama's own default, 2, is a letter of this tokenizer
        tie_word_embeddings=tied,
    )


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"eos_token": "</s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    made.chat_template = template
    return made


@pytest.fixture
def make_model() -> Callable[..., Path]:
    """Writes a random model with its tokenizer to a folder."""

    def make(
        folder: Path,
        name: str = "llama",
        template: str | None = CHATML,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ) -> Path:
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config(name), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        model.save_pretrained(str(folder))
        tokenizer(template).save_pretrained(str(folder))
        return folder

    return make


@pytest.fixture
def make_adapter() -> Callable[..., Path]:
    """Writes an adapter on a base, all its values random: B too, and modules that train whole."""

    def make(folder: Path, base: Path | PreTrainedModel, seed: int = 5, **settings: object) -> Path:
        model = AutoModelForCausalLM.from_pretrained(str(base)) if isinstance(base, Path) else base
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        return folder

    return make
