"""Rows as people read them."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from tunefleet.data.prepare import prepare
from tunefleet.data.settings import DataSettings
from tunefleet.data.show import LEARNED_STYLE, READ_STYLE, rows_as_json, rows_as_plain, rows_as_text
from tunefleet.data.tokens import TokenSplit

PROMPT = "<|im_start|>user\nwhat is 0?<|im_end|>\n<|im_start|>assistant\n"


def shown(settings: Callable[..., DataSettings], tokenizer: PreTrainedTokenizerBase, **keys: object) -> TokenSplit:
    split = prepare(settings(**keys), tokenizer, seed=0, need_eval=False).train
    assert split is not None
    return split


def test_learned_tokens_have_a_colour_of_their_own(
    settings: Callable[..., DataSettings], chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    split = shown(settings, chat_tokenizer)
    texts = rows_as_text(split, chat_tokenizer, 2)
    assert len(texts) == 2
    parts = [(texts[0].plain[span.start : span.end], span.style) for span in texts[0].spans]
    assert parts == [(PROMPT, READ_STYLE), ("the fox <|im_end|>", LEARNED_STYLE)]
    assert rows_as_plain(split, chat_tokenizer, 1) == [f"{PROMPT}[[the fox <|im_end|>]]"]
    (row,) = rows_as_json(split, chat_tokenizer, 1)
    assert row["tokens"] == sum(span["tokens"] for span in row["spans"])
    assert row["targets"] == sum(span["tokens"] for span in row["spans"] if span["learned"])
    assert len(rows_as_text(split, chat_tokenizer, 1000)) == 40


def test_segments_of_a_packed_row_are_told_apart(
    settings: Callable[..., DataSettings], chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    split = shown(settings, chat_tokenizer, packing=True, train_on_prompt=True, cutoff_len=400)
    (row,) = rows_as_json(split, chat_tokenizer, 1)
    count = len(split.row(0).segments)
    assert count > 1
    assert [span["segment"] for span in row["spans"]] == [n for n in range(count) for _ in range(2)]
    # with everything learned, the first token of each segment still is not
    assert [(span["learned"], span["tokens"] == 1) for span in row["spans"][::2]] == [(False, True)] * count
    assert rows_as_plain(split, chat_tokenizer, 1)[0].count("next segment") == count - 1
    assert rows_as_text(split, chat_tokenizer, 1)[0].plain.count("next segment") == count - 1
