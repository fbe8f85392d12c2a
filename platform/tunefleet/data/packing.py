"""Which sequences share a row of at most `capacity` tokens."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill rows one after the other, each time with the longest sequence that still fits.

    Every index appears once; equal lengths keep their order, so the result depends on `lengths` alone. Raises
    `ValueError` if a sequence is longer than `capacity`, or empty.
    """
    waiting: dict[int, list[int]] = {}
    for index in reversed(range(len(lengths))):
        if not 0 < lengths[index] <= capacity:
            raise ValueError(f"a sequence of {lengths[index]} tokens does not fit into rows of {capacity}")
        waiting.setdefault(lengths[index], []).append(index)
    fits = _LongestAtMost(capacity, set(waiting))
    rows: list[list[int]] = []
    placed = 0
    while placed < len(lengths):
        row: list[int] = []
        room = capacity
        while length := fits.find(room):
            row.append(waiting[length].pop())
            room -= length
            if not waiting[length]:
                fits.remove(length)
        rows.append(row)
        placed += len(row)
    return rows


class _LongestAtMost:
    """The largest length of a shrinking set that is not above a bound, in near-constant time; 0 if there is none."""

    def __init__(self, capacity: int, present: set[int]) -> None:
        # below[n] == n: length n is there; else the answer for n is that for below[n]
        self._below = [n if n in present or n == 0 else n - 1 for n in range(capacity + 1)]

    def find(self, bound: int) -> int:
        root = bound
        while self._below[root] != root:
            root = self._below[root]
        while self._below[bound] != root and bound != root:
            self._below[bound], bound = root, self._below[bound]
        return root

    def remove(self, length: int) -> None:
        self._below[length] = length - 1
