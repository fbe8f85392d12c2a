"""What workers tell the driver while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

from tunefleet.artifacts.metrics import Line
from tunefleet.training.loop import Step


@dataclass(frozen=True)
class Started:
    """The workers stand ready and are about to take the update after `start_step`."""

    start_step: int
    updates: int
    world_size: int


@dataclass(frozen=True)
class Stepped:
    """An update was applied."""

    step: Step


@dataclass(frozen=True)
class Logged:
    """A line was written to `metrics.jsonl`: means since the line before."""

    line: Line


@dataclass(frozen=True)
class Evaluated:
    step: int
    loss: float


@dataclass(frozen=True)
class Saved:
    step: int


@dataclass(frozen=True)
class Noticed:
    text: str


Event = Started | Stepped | Logged | Evaluated | Saved | Noticed
