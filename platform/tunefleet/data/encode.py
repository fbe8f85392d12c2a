"""Conversations or documents -> token sequences, in chunks, on one process or several with the same result."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from tunefleet.data.formats import BadRecord, Conversation
from tunefleet.data.masking import Masking, PieceEncoder, Sequence1D, TurnText, masked, turn_ids, turn_texts
from tunefleet.data.templates import Template, end_token_id, starts_with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000
# Below this a second process takes longer to start than the first needs for everything.
_ROWS_WORTH_PROCESSES = 50_000

Example = Conversation | str
# What became of one example: its sequences, or why it cannot be used.
Encoded = list[Sequence1D] | str


@dataclass(frozen=True)
class Encoder:
    """Everything that turns an example into sequences. `template` is None for documents. Travels to processes."""

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    masking: Masking

    def __call__(self, examples: Sequence[Example]) -> list[Encoded]:
        """Encode one chunk; the answers stand in the order of `examples`."""
        if self.template is None:
            return self._documents([str(example) for example in examples])
        texts: list[list[list[TurnText]] | str] = []
        for example in examples:
            assert isinstance(example, Conversation)
            try:
                sequences = turn_texts(example, self.template, self.tokenizer)
                texts.append(sequences[-1:] if self.masking.mask_history else sequences)
            except BadRecord as bad:
                texts.append(str(bad))
        flat = [turns for sequences in texts if not isinstance(sequences, str) for turns in sequences]
        ids = iter(turn_ids(flat, PieceEncoder(self.tokenizer), self.tokenizer))
        return [
            found if isinstance(found, str) else [masked(next(ids), self.masking) for _ in found] for found in texts
        ]

    def _documents(self, texts: Sequence[str]) -> list[Encoded]:
        """Every token is learned; a document longer than cutoff_len becomes pieces that do not see each other."""
        end = end_token_id(self.tokenizer)
        begin = [int(self.tokenizer.bos_token_id)] if starts_with_bos(self.tokenizer) else []
        length = self.masking.cutoff_len
        encoded: list[Encoded] = []
        for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
            whole = np.array([*begin, *ids, end], dtype=np.int32)
            pieces = (whole[start : start + length] for start in range(0, len(whole), length))
            encoded.append([Sequence1D(piece, piece) for piece in pieces])
        return encoded


def encode_all(
    examples: Sequence[Example], encoder: Encoder, processes: int | None, report: Callable[[int, int], None]
) -> list[Encoded]:
    """Encode every example, in order. `processes` None: as many as there are CPUs, if that is worth starting them."""
    chunks = [examples[start : start + _CHUNK] for start in range(0, len(examples), _CHUNK)]
    if processes is None:
        processes = (os.cpu_count() or 1) if len(examples) >= _ROWS_WORTH_PROCESSES else 1
    encoded: list[Encoded] = []
    for part in _mapped(chunks, encoder, min(processes, len(chunks))):
        encoded += part
        report(len(encoded), len(examples))
    return encoded


def _mapped(chunks: Sequence[Sequence[Example]], encoder: Encoder, processes: int) -> Iterator[list[Encoded]]:
    if processes <= 1:
        yield from map(encoder, chunks)
        return
    # A forked child would inherit the locks of threads that it does not have (Ray, tokenizers): start clean ones.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_call, repeat(encoder), chunks)


def _call(encoder: Encoder, chunk: Sequence[Example]) -> list[Encoded]:
    return encoder(chunk)
