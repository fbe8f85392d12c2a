"""Token rows on disk."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from tunefleet.data.masking import Sequence1D
from tunefleet.data.tokens import open_split, write_split


def segments(random: np.random.Generator, count: int) -> list[Sequence1D]:
    made = []
    for _ in range(count):
        ids = random.integers(0, 99, random.integers(1, 20)).astype(np.int32)
        made.append(Sequence1D(ids, np.where(random.random(len(ids)) < 0.5, ids, -100).astype(np.int32)))
    return made


def test_rows_come_back_as_they_went_over_several_record_batches(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [segments(random, int(random.integers(1, 4))) for _ in range(17_000)]
    seen: list[tuple[int, int]] = []
    write_split(tmp_path / "x.arrow", rows, lambda done, total: seen.append((done, total)))
    split = open_split(tmp_path / "x.arrow")
    assert split.rows == 17_000
    assert seen == [(8192, 17_000), (16384, 17_000), (17_000, 17_000)]
    for index in (0, 8191, 8192, 16384, 16_999, *random.integers(0, 17_000, 200)):
        row = split.row(int(index))
        assert np.array_equal(row.input_ids, np.concatenate([part.ids for part in rows[index]]))
        assert np.array_equal(row.labels, np.concatenate([part.labels for part in rows[index]]))
        assert row.segments.tolist() == [len(part.ids) for part in rows[index]]
        assert split.lengths[index] == row.segments.sum()
        assert split.targets[index] == sum(int((part.labels[1:] != -100).sum()) for part in rows[index])
    assert split.tokens == split.lengths.sum()
    assert split.target_tokens == split.targets.sum()
    with pytest.raises(IndexError):
        split.row(17_000)


def test_a_row_is_a_read_only_view(tmp_path: Path) -> None:
    write_split(tmp_path / "x.arrow", [segments(np.random.default_rng(0), 1)] * 1000, lambda _done, _total: None)
    split = open_split(tmp_path / "x.arrow")
    row = split.row(3)
    assert row.input_ids.base is not None
    assert not row.input_ids.flags.writeable
    start = time.perf_counter()
    for index in range(1000):
        split.row(index)
    assert time.perf_counter() - start < 0.2


def test_no_rows(tmp_path: Path) -> None:
    write_split(tmp_path / "x.arrow", [], lambda _done, _total: None)
    assert open_split(tmp_path / "x.arrow").rows == 0
