"""Rows filled by best fit."""

from __future__ import annotations

import numpy as np
import pytest

from tunefleet.data.packing import best_fit


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, spelled out: always the longest that fits, the earliest of equals."""
    waiting = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows = []
    while waiting:
        row, room = [], capacity
        while fitting := [index for index in waiting if lengths[index] <= room]:
            row.append(fitting[0])
            room -= lengths[fitting[0]]
            waiting.remove(fitting[0])
        rows.append(row)
    return rows


def test_rows_are_those_of_the_definition() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        capacity = int(random.integers(1, 60))
        lengths = random.integers(1, capacity + 1, random.integers(0, 50)).tolist()
        rows = best_fit(lengths, capacity)
        assert rows == slow_best_fit(lengths, capacity)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in row) <= capacity for row in rows)


def test_what_cannot_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        best_fit([3, 9], 8)
