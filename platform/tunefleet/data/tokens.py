"""Token rows in an Arrow file: written once, then memory-mapped and read without copies.

Shapes: N rows; T tokens of one row; S segments of one row, each of which attends to itself only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tunefleet.data.masking import IGNORED, Int32, Sequence1D

Int64 = npt.NDArray[np.int64]

_ROWS_IN_A_BATCH = 8192
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("labels", pa.large_list(pa.int32())),
        ("segments", pa.large_list(pa.int32())),
        ("targets", pa.int64()),
    ]
)


class Row(NamedTuple):
    """One row: input_ids (T,) int32, labels (T,) int32 (-100: not learned), segments (S,) int32 lengths with sum T."""

    input_ids: Int32
    labels: Int32
    segments: Int32


class _Column(NamedTuple):
    """One list column of one record batch: row i is values[offsets[i]:offsets[i + 1]]."""

    offsets: Int64
    values: Int32

    def row(self, index: int) -> Int32:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class _RowBatch(NamedTuple):
    input_ids: _Column
    labels: _Column
    segments: _Column


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The rows of one file, memory-mapped and read only.

    lengths: (N,) int64 tokens of each row. targets: (N,) int64 learned tokens of each row after the shift: the first
    token of a segment is never a target.
    """

    folder: Path
    rows: int
    tokens: int
    target_tokens: int
    lengths: Int64
    targets: Int64
    _starts: Int64
    _batches: tuple[_RowBatch, ...]

    def row(self, index: int) -> Row:
        """Row `index` as views into the file. Raises `IndexError` outside 0..N-1."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch, at = self._batches[number], index - int(self._starts[number])
        return Row(batch.input_ids.row(at), batch.labels.row(at), batch.segments.row(at))


def open_split(file: Path) -> TokenSplit:
    """Memory-map a file that `write_split` wrote. Raises pyarrow's `ArrowInvalid` if it is none."""
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    batches = []
    lengths: list[Int64] = []
    targets: list[Int64] = []
    for number in range(reader.num_record_batches):
        record_batch = reader.get_batch(number)
        batch = _RowBatch(*(_views(record_batch.column(name)) for name in _RowBatch._fields))
        batches.append(batch)
        lengths.append(np.diff(batch.input_ids.offsets))
        targets.append(record_batch.column("targets").to_numpy())
    all_lengths = np.concatenate([np.empty(0, np.int64), *lengths])
    all_targets = np.concatenate([np.empty(0, np.int64), *targets])
    return TokenSplit(
        folder=file.parent,
        rows=len(all_lengths),
        tokens=int(all_lengths.sum()),
        target_tokens=int(all_targets.sum()),
        lengths=all_lengths,
        targets=all_targets,
        _starts=np.cumsum([0, *(len(part) for part in lengths)])[:-1].astype(np.int64),
        _batches=tuple(batches),
    )


def write_split(file: Path, rows: Sequence[Sequence[Sequence1D]], report: Callable[[int, int], None]) -> None:
    """Write rows, each a list of segments, as one Arrow IPC file. `report(done, total)` counts rows."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for start in range(0, len(rows), _ROWS_IN_A_BATCH):
            part = rows[start : start + _ROWS_IN_A_BATCH]
            writer.write_batch(_record_batch(part))
            report(start + len(part), len(rows))


def target_count(segment: Sequence1D) -> int:
    """How many tokens of a segment are learned: its first token has nothing before it that could predict it."""
    return int(np.count_nonzero(segment.labels[1:] != IGNORED))


def _views(column: pa.LargeListArray) -> _Column:
    return _Column(column.offsets.to_numpy(), column.values.to_numpy())


def _record_batch(rows: Sequence[Sequence[Sequence1D]]) -> pa.RecordBatch:
    ids = [np.concatenate([segment.ids for segment in row]) for row in rows]
    labels = [np.concatenate([segment.labels for segment in row]) for row in rows]
    segments = [np.array([len(segment.ids) for segment in row], dtype=np.int32) for row in rows]
    targets = pa.array([sum(target_count(segment) for segment in row) for row in rows], pa.int64())
    return pa.record_batch([_lists(ids), _lists(labels), _lists(segments), targets], schema=_SCHEMA)


def _lists(rows: Sequence[Int32]) -> pa.LargeListArray:
    offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
