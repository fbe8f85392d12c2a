"""What workers tell the driver while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

from tunefleet.artifacts.metrics import Line
from tunefleet.training.step import Step


@dataclass(frozen=True)
class Arrived:
    """The workers have their places: the cluster had room for them."""


@dataclass(frozen=True)
class Lost:
    """Workers failed; places for all are asked for again, unless the run gives up."""


@dataclass(frozen=True)
class Worker:
    """A rank, where it sits and what it has there."""

    rank: int
    local_rank: int
    """As LOCAL_RANK says."""
    node: str
    """Ray's name of the node."""
    device: str
    backend: str
    """What collectives go through: gloo or nccl."""
    threads: int
    """Of torch."""
    made_data: bool
    """Whether this worker tokenised the data, which one worker of a node does where the node has not got them."""


@dataclass(frozen=True)
class Started:
    """The workers stand ready and are about to take the update after `start_step`."""

    start_step: int
    updates: int
    world_size: int
    workers: tuple[Worker, ...] = ()


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


Event = Arrived | Lost | Started | Stepped | Logged | Evaluated | Saved | Noticed
