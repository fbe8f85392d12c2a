"""How each worker gets on: its time, its tokens, its memory, brought together at the steps that have a line anyway."""

from __future__ import annotations

import re
import resource
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import torch

from tunefleet.training.engines.engine import Engine
from tunefleet.training.step import Step

_NAME_BYTES = 64
"""Of a node's name, what travels."""


@dataclass(frozen=True)
class Figures:
    """One worker since the line before. Seconds are of one step, on average."""

    step_seconds: float
    """The whole update, waiting for other workers included."""
    compute_seconds: float
    """Its own forward and backward passes (`Pace.compute_seconds`); nan where that is not known."""
    data_wait_seconds: float
    tokens_per_second: float
    """Of the tokens that it was fed itself."""
    seconds_per_token: float
    """Of its own passes; nan where that is not known. Shares differ a little, so this is what compares workers."""
    bytes_sent: float
    """Handed to collectives for one step, on average."""
    memory_peak_bytes: float
    """Since the worker began: resident on a CPU, allocated by torch on a GPU."""


SHOWN = tuple(field.name for field in fields(Figures) if field.name != "seconds_per_token")
"""The figures that a line holds."""


class Pacing:
    """Adds up this worker's steps, and brings all workers' figures together."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        """Collective: every worker tells the others the name of its node."""
        self._engine, self._device = engine, device
        self.nodes = [bytes(name.tolist()).rstrip(b"\0").decode() for name in engine.gather(_padded(node_name()))]
        """The node of each rank."""
        self._begin()

    def add(self, step: Step) -> None:
        """Take an update in."""
        self._steps += 1
        self._seconds += step.seconds
        self._tokens += step.pace.tokens
        self._data_wait_seconds += step.pace.data_wait_seconds
        own = step.pace.compute_seconds
        self._compute_seconds += float("nan") if own is None else own

    def gather(self) -> list[Figures]:
        """Every worker's figures since the last time, by rank; then begin anew. Collective."""
        own = torch.tensor(astuple(self._figures()), dtype=torch.float64)
        gathered = self._engine.gather(own.view(torch.uint8))
        self._begin()
        return [Figures(*piece.view(torch.float64).tolist()) for piece in gathered]

    def _begin(self) -> None:
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
        self._data_wait_seconds, self._compute_seconds = 0.0, 0.0
        self._bytes_before = self._engine.bytes_sent

    def _figures(self) -> Figures:
        steps = max(self._steps, 1)
        return Figures(
            step_seconds=self._seconds / steps,
            compute_seconds=self._compute_seconds / steps,
            data_wait_seconds=self._data_wait_seconds / steps,
            tokens_per_second=self._tokens / self._seconds if self._seconds else 0.0,
            seconds_per_token=self._compute_seconds / self._tokens if self._tokens else float("nan"),
            bytes_sent=(self._engine.bytes_sent - self._bytes_before) / steps,
            memory_peak_bytes=float(peak_memory_bytes(self._device)),
        )


def columns(workers: Sequence[Figures]) -> dict[str, list[float]]:
    """What a line shows of the workers: for each figure one number for each rank."""
    figures = [asdict(one) for one in workers]
    return {name: [one[name] for one in figures] for name in SHOWN} if figures else {}


def node_name() -> str:
    """What people call this machine."""
    return socket.gethostname()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this worker has held so far: allocated by torch on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # The kernel's own peak of this program. getrusage also counts the larger process that this one was forked from.
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _padded(name: str) -> torch.Tensor:
    data = name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
    return torch.tensor(list(data), dtype=torch.uint8)
