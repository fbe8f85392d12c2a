"""Small tokenizers, made here: a byte-level BPE with or without the special tokens of the named templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunefleet.data.settings import DataSettings

MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "what is two and two? four.", "user assistant system hello"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models do: the last answer shows an (empty) thought, earlier answers lose it.
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    *, marks: bool = True, bos: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", *(MARKS if marks else ())]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(CORPUS * 5, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_blank_first() -> PreTrainedTokenizerBase:
    """A tokenizer of the SentencePiece kind: a blank is put before every text, line breaks are bytes."""
    words = ["▁", "a", "b", "c", "▁a", "▁b", "[", "]"]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "<0x0A>", *words])}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """Makes a byte-level tokenizer: `marks`, `bos`, `chat_template`."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def blank_first_tokenizer() -> PreTrainedTokenizerBase:
    """Puts a blank before every text, as the SentencePiece family does."""
    return make_blank_first()


@pytest.fixture(scope="session")
def chatml() -> str:
    """ChatML as a chat template."""
    return CHATML


@pytest.fixture(scope="session")
def forgetting() -> str:
    """A chat template that rewrites earlier turns."""
    return FORGETTING


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerBase:
    """Knows the marks of all named templates; no chat template of its own."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    """Its own chat template is ChatML, without generation marks."""
    return byte_tokenizer(chat_template=CHATML)


@pytest.fixture
def alpaca_rows() -> list[dict[str, str]]:
    """Forty rows of different lengths."""
    return [
        {"instruction": f"what is {n}?" + " really" * (n % 5), "input": "", "output": "the fox " * (1 + n % 7)}
        for n in range(40)
    ]


@pytest.fixture
def settings(tmp_path: Path, alpaca_rows: list[dict[str, str]]) -> Callable[..., DataSettings]:
    """Makes settings over the forty rows (as rows.json), with a cache of the test's own."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(alpaca_rows))

    def make(**keys: object) -> DataSettings:
        given = {"dataset": str(rows), "dataset_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), **keys}
        return DataSettings.model_validate(given)

    return make
