"""Token rows as people read them: what is learned in one colour, what is only read in another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
from rich.text import Text

from tunefleet.data.masking import IGNORED
from tunefleet.data.tokens import Row, TokenSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED_STYLE = "bold green"
READ_STYLE = "dim"
SEAM_STYLE = "yellow"
_SEAM = "\n-- next segment --\n"


class Span(NamedTuple):
    """Tokens that stand together and are all learned, or all only read."""

    segment: int
    learned: bool
    text: str
    tokens: int


class SpanJson(TypedDict):
    """A `Span` for `--json`."""

    segment: int
    learned: bool
    text: str
    tokens: int


class RowJson(TypedDict):
    """One row for `--json`."""

    row: int
    tokens: int
    targets: int
    spans: list[SpanJson]


def rows_as_text(split: TokenSplit, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Text]:
    """The first `count` rows, learned tokens coloured."""
    shown = []
    for number in range(min(count, split.rows)):
        text = Text()
        segment = 0
        for span in spans(split.row(number), tokenizer):
            if span.segment != segment:
                text.append(_SEAM, style=SEAM_STYLE)
            segment = span.segment
            text.append(span.text, style=LEARNED_STYLE if span.learned else READ_STYLE)
        shown.append(text)
    return shown


def rows_as_plain(split: TokenSplit, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The first `count` rows for a screen without colours: learned tokens stand between double square brackets."""
    shown = []
    for number in range(min(count, split.rows)):
        parts: list[str] = []
        segment = 0
        for span in spans(split.row(number), tokenizer):
            parts.append(_SEAM if span.segment != segment else "")
            parts.append(f"[[{span.text}]]" if span.learned else span.text)
            segment = span.segment
        shown.append("".join(parts))
    return shown


def rows_as_json(split: TokenSplit, tokenizer: PreTrainedTokenizerBase, count: int) -> list[RowJson]:
    """The first `count` rows as values for `--json`."""
    return [
        RowJson(
            row=number,
            tokens=int(split.lengths[number]),
            targets=int(split.targets[number]),
            spans=[
                SpanJson(segment=span.segment, learned=span.learned, text=span.text, tokens=span.tokens)
                for span in spans(split.row(number), tokenizer)
            ],
        )
        for number in range(min(count, split.rows))
    ]


def spans(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    """Cut a row where a segment begins or learning starts or stops; the first token of a segment is never learned."""
    ends = np.cumsum(row.segments)
    starts = ends - row.segments
    learned = row.labels != IGNORED
    learned[starts] = False
    changes = np.flatnonzero(np.diff(learned)) + 1
    edges = np.unique(np.concatenate([starts, changes, ends]))
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        yield Span(
            segment=int(np.searchsorted(ends, start, side="right")),
            learned=bool(learned[start]),
            text=str(tokenizer.decode(row.input_ids[start:end].tolist(), skip_special_tokens=False)),
            tokens=end - start,
        )
