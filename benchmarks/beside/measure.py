"""What a run gave, and what several runs of one side come to. Pure: no files, no processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

WARM_UP_STEPS = 3  # not counted in the steady rate: the first steps fill caches and allocate


@dataclass(frozen=True)
class Run:
    """One finished run of one side.

    `step_seconds` and `step_tokens` hold one number for each optimizer step: its duration on the side's own clock and
    the real (not padding) tokens in it. The first entry of `step_seconds` may be missing where a clock starts with the
    end of step 1; `steady_rate` reads only the last entries of both.
    """

    wall_seconds: float
    step_seconds: tuple[float, ...]
    step_tokens: tuple[float, ...]
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]

    @property
    def tokens(self) -> float:
        """Real tokens of the whole run."""
        return sum(self.step_tokens)

    @property
    def steady_rate(self) -> float:
        """Real tokens per second once warm: the first WARM_UP_STEPS steps and everything outside the loop left out."""
        steps = max(1, len(self.step_tokens) - WARM_UP_STEPS)
        return sum(self.step_tokens[-steps:]) / sum(self.step_seconds[-steps:])

    @property
    def whole_rate(self) -> float:
        """Real tokens per second of the command from its start to its exit."""
        return self.tokens / self.wall_seconds


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of the repetitions."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.0f} ({self.least:.0f}-{self.greatest:.0f})"


def spread(numbers: Sequence[float]) -> Spread:
    """Return the spread of at least one number."""
    return Spread(median(numbers), min(numbers), max(numbers))


def intervals(stamps: Sequence[float]) -> tuple[float, ...]:
    """Return what lies between neighbouring stamps: one number fewer than there are stamps."""
    return tuple(later - earlier for earlier, later in pairwise(stamps))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are padded, so that it reads as plain text too."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)
