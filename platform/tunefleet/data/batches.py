"""Row numbers -> global batches -> shares of workers -> micro-batches -> tensors. Pure: no disk, no global state.

Shapes: G samples of a global batch; W workers; T tokens laid end to end; B segments padded to length L; N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunefleet.data.masking import IGNORED
from tunefleet.data.tokens import Int64, Row


def epoch_order(rows: int, seed: int, epoch: int) -> Int64:
    """The order of all rows in one epoch, (rows,) int64: a pure function with a generator of its own."""
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return random.permutation(rows).astype(np.int64, copy=False)


@lru_cache(maxsize=2)
def _kept_order(rows: int, seed: int, epoch: int) -> Int64:
    order = epoch_order(rows, seed, epoch)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class BatchSchedule:
    """The sequence of global batches: `updates` in all, each `global_batch` samples of `rows`, depending on `seed`.

    The last batch of an epoch is short where the numbers do not divide: it neither repeats nor drops a row.
    """

    rows: int
    global_batch: int
    updates: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.global_batch < 1:
            raise ValueError(f"no batches of {self.global_batch} from {self.rows} rows")

    @property
    def updates_per_epoch(self) -> int:
        """How many updates see every row once."""
        return -(-self.rows // self.global_batch)

    def indices(self, update: int) -> Int64:
        """The rows of update number `update`, counted from 0: (G,) int64. Raises `IndexError` outside 0..updates-1."""
        if not 0 <= update < self.updates:
            raise IndexError(f"update {update} of {self.updates}")
        epoch, position = divmod(update, self.updates_per_epoch)
        start = position * self.global_batch
        return _kept_order(self.rows, self.seed, epoch)[start : start + self.global_batch]

    def epoch(self, update: int) -> float:
        """How many times all rows have been seen when `update` updates are done."""
        epoch, position = divmod(update, self.updates_per_epoch)
        return epoch + position * self.global_batch / self.rows


def deal(indices: npt.NDArray[Any], lengths: npt.NDArray[Any], workers: int) -> list[Int64]:
    """Deal the rows of a global batch to `workers`: equally many rows each (one more or less), tokens balanced.

    Rounds of one row for each worker, longest rows first; in each round the worker with the fewest tokens so far
    gets the longest row. Then single rows are exchanged for as long as that narrows the widest gap. `lengths` is
    indexed by row number. A share keeps the order of `indices`.
    """
    row_lengths = np.asarray(lengths, dtype=np.int64)[indices]
    longest_first = np.argsort(-row_lengths, kind="stable")
    tokens = np.zeros(workers, dtype=np.int64)
    positions: list[list[int]] = [[] for _ in range(workers)]
    for start in range(0, len(longest_first), workers):
        hands = longest_first[start : start + workers]
        for worker, position in zip(np.argsort(tokens, kind="stable"), hands, strict=False):
            positions[worker].append(int(position))
            tokens[worker] += row_lengths[position]
    _exchange(positions, tokens, row_lengths)
    return [np.asarray(indices, dtype=np.int64)[np.sort(np.array(share, dtype=np.int64))] for share in positions]


def _exchange(positions: list[list[int]], tokens: Int64, row_lengths: Int64) -> None:
    """Swap rows between the fullest and the emptiest share while that narrows their gap. Changes both arguments."""
    for _ in range(4 * len(positions)):
        fullest, emptiest = int(np.argmax(tokens)), int(np.argmin(tokens))
        gap = int(tokens[fullest] - tokens[emptiest])
        give, take = positions[fullest], positions[emptiest]
        if gap < 2 or not take:
            return
        moved = row_lengths[give][:, None] - row_lengths[take][None, :]  # tokens that a swap carries over
        left = np.abs(gap - 2 * moved)
        giving, taking = np.unravel_index(int(np.argmin(left)), left.shape)
        if left[giving, taking] >= gap:
            return
        tokens[fullest] -= moved[giving, taking]
        tokens[emptiest] += moved[giving, taking]
        give[giving], take[taking] = take[taking], give[giving]


def micro_batches(share: npt.NDArray[Any], micro_batch: int) -> list[Int64]:
    """Cut a share into pieces of `micro_batch` rows, the last one perhaps shorter; an empty share has no piece."""
    return [share[start : start + micro_batch] for start in range(0, len(share), micro_batch)]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch on one worker: laid end to end as (1, T), or padded as (B, L).

    input_ids, position_ids: int64; positions restart in each segment.
    attention_mask: (B, L) int64, None when laid end to end.
    segment_lengths: in order, sum T; empty when padded.
    target_positions: (N,) unique indices into the flattened positions whose *next* token is a target; target_ids: (N,).
    tokens: real tokens, padding apart.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segment_lengths: tuple[int, ...]
    target_positions: Tensor
    target_ids: Tensor
    tokens: int


def collate(rows: Sequence[Row], *, pad_token_id: int | None) -> Batch:
    """Lay rows end to end (`pad_token_id` None), or pad each segment on the right to the longest one.

    Raises `ValueError` if there are no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)  # (T,)
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)  # (T,)
    lengths = np.concatenate([row.segments for row in rows]).astype(np.int64)  # (S,)
    starts = np.cumsum(lengths) - lengths  # (S,)
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)  # (T,)
    # The first token of a segment is never a target: nothing before it belongs to it.
    learned = np.flatnonzero((labels != IGNORED) & (positions > 0))  # (N,)
    if pad_token_id is None:
        places, shape = np.arange(len(ids)), (1, len(ids))
    else:
        places = np.repeat(np.arange(len(lengths)) * lengths.max(), lengths) + positions
        shape = (len(lengths), int(lengths.max()))
    return Batch(
        input_ids=_placed(ids, places, shape, pad_token_id or 0),
        position_ids=_placed(positions, places, shape, 0),
        attention_mask=None if pad_token_id is None else _placed(np.ones_like(ids), places, shape, 0),
        segment_lengths=tuple(int(length) for length in lengths) if pad_token_id is None else (),
        target_positions=torch.from_numpy(places[learned] - 1),
        target_ids=torch.from_numpy(labels[learned]),
        tokens=len(ids),
    )


def without_targets(batch: Batch) -> Batch:
    """The same tokens with nothing to learn: its loss is zero, and so is every gradient."""
    return replace(batch, target_positions=batch.target_positions[:0], target_ids=batch.target_ids[:0], tokens=0)


def _placed(values: Int64, places: Int64, shape: tuple[int, int], filler: int) -> Tensor:
    """values (T,) at flat `places` of a tensor of `shape`, `filler` elsewhere."""
    flat = np.full(shape[0] * shape[1], filler, dtype=np.int64)
    flat[places] = values
    return torch.from_numpy(flat.reshape(shape))
