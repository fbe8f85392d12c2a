"""Which block of a model trains when: a pure function of how many updates have been applied.

Legend: D blocks, K updates of a visit, u updates applied so far, v = u // K the number of the visit (from 0). Where K
was changed on the way, visits are counted from an origin (u0, v0): v = v0 + (u - u0) // K.

BAdam (Luo et al., arXiv 2404.02827, algorithm 1) walks over the blocks and stays K updates on each. Nothing is drawn
from the global random state and nothing needs saving but u, so a run goes on from any update as if it had never
stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tunefleet_strategies.optim.draws import generator_of

SwitchMode = Literal["ascending", "descending", "random", "fixed"]

NEVER = -1
"""The interval that never ends the first visit."""


@dataclass(frozen=True)
class Origin:
    """Where the counting of visits begins."""

    updates: int = 0
    """u0: applied when visit v0 began."""
    visit: int = 0
    """v0"""


START = Origin()
"""The beginning of a run whose interval has never changed."""


def visit_of(updates: int, interval: int, origin: Origin = START) -> int:
    """The visit that the update after `updates` applied ones belongs to, always v0 if K is `NEVER`."""
    return origin.visit + (0 if interval == NEVER else (updates - origin.updates) // interval)


def updates_in_visit(updates: int, interval: int, origin: Origin = START) -> int:
    """How many updates of that visit are applied."""
    since = updates - origin.updates
    return since if interval == NEVER else since % interval


@dataclass(frozen=True)
class BlockSchedule:
    """The walk over the blocks."""

    blocks: int
    """D, at least 1."""
    interval: int
    """K, at least 1, or `NEVER`."""
    mode: SwitchMode
    start: int | None = None
    """The first block. None: the last one where they descend, any where they are drawn, else the first."""
    seed: int = 0
    """What the order is drawn by in mode `random`."""

    def block(self, updates: int) -> int:
        """The block that the next update trains when `updates` have been applied and the interval never changed."""
        return self.of_visit(visit_of(updates, self.interval))

    def of_visit(self, visit: int) -> int:
        """The block that a visit trains."""
        if self.mode == "ascending":
            return ((self.start or 0) + visit) % self.blocks
        if self.mode == "descending":
            return ((self.blocks - 1 if self.start is None else self.start) - visit) % self.blocks
        if self.mode == "random":
            return self.order(visit // self.blocks)[visit % self.blocks]
        return self.start or 0

    def order(self, number: int) -> tuple[int, ...]:
        """In mode `random`, the order in which round `number` visits every block once.

        One block may end a round and open the next. A start block comes first in round 0.
        """
        drawn: list[int] = torch.randperm(self.blocks, generator=generator_of(self.seed, "round", number)).tolist()
        if number == 0 and self.start is not None:
            drawn.remove(self.start)
            drawn.insert(0, self.start)
        return tuple(drawn)

    def visited(self, updates: int) -> frozenset[int]:
        """The blocks that a run of so many updates trains."""
        if updates <= 0:
            return frozenset()
        visits = visit_of(updates - 1, self.interval) + 1
        rounds = min(visits, self.blocks)  # a whole round has every block in it
        return frozenset(self.block(visit * max(self.interval, 1)) for visit in range(rounds))
