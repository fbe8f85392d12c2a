"""Which worker the others wait for.

What is compared is each worker's own work per token, never its step time: as they meet at every update, all of them
take as long as the slowest. A worker is named when it needs SLOW times what the others need (their median) in LINES
logged lines in a row. Below SLOW a better machine would win less than a fifth, and machines of one kind differ by some
percent; a checkpoint, a page cache or a neighbour slows one line or two, a bad machine all of them. The first line of
an attempt is left out, as kernels and caches warm up in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

SLOW = 1.25
"""Times the others' median from which a worker counts as slow."""
LINES = 3
"""Logged lines in a row that it must be slow in."""


class StragglerWatch:
    """Watches one attempt, on rank 0."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """
        Args:
            nodes: the node of each rank.
        """
        self._nodes = nodes
        self._slow_lines: list[list[float]] = [[] for _ in nodes]
        self._warm = False

    def look(self, seconds_per_token: Sequence[float]) -> list[str]:
        """Take a line's figures in, one for each rank, nan where not known. Returns a sentence for each new straggler.

        A worker that stays slow is named once; one that was not slow for a line may be named again.
        """
        if not self._warm:
            self._warm = True
            return []
        named: list[str] = []
        for rank, ratio in enumerate(slowness(seconds_per_token)):
            lines = self._slow_lines[rank]
            if ratio < SLOW:
                lines.clear()
                continue
            lines.append(ratio)
            if len(lines) == LINES:
                named.append(self._sentence(rank, median(lines)))
        return named

    def _sentence(self, rank: int, ratio: float) -> str:
        return (
            f"Rank {rank} on {self._nodes[rank]} is a straggler: its own work took {ratio:.1f} times what the other "
            f"workers needed for as many tokens, in {LINES} logged lines in a row; they wait for it at every step."
        )


def slowness(seconds_per_token: Sequence[float]) -> list[float]:
    """For each rank its own figure / the median of the others'; 0 where either is not known."""
    ratios: list[float] = []
    for rank, own in enumerate(seconds_per_token):
        others = [one for other, one in enumerate(seconds_per_token) if other != rank and not math.isnan(one)]
        typical = median(others) if others else 0.0
        ratios.append(own / typical if typical > 0 and not math.isnan(own) else 0.0)
    return ratios
