"""The line between a search's driver and its trials: how far each is, and what it shall do: stop, or move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a trial is."""

    step: int
    updates: int
    loss: float | None
    nodes: tuple[str, ...] = ()
    """Where its workers are, by Ray's names."""


@dataclass(frozen=True)
class Orders:
    """What the search wants of a trial."""

    stop: bool = False
    leave: tuple[str, ...] = ()
    """Nodes that it shall go on without, by Ray's names."""


class Board:
    """State of the line. Lives in an actor of its own that takes no CPU."""

    def __init__(self) -> None:
        self._progress: dict[str, Progress] = {}
        self._stop = False
        self._leave: dict[str, tuple[str, ...]] = {}

    def tell(self, trial: str, progress: Progress | None) -> Orders:
        """Note how far a trial is. Returns what it shall do."""
        if progress is not None:
            self._progress[trial] = progress
        return Orders(self._stop, self._leave.get(trial, ()))

    def leave(self, trial: str, nodes: Sequence[str]) -> None:
        """Let a trial go on without some nodes."""
        self._leave[trial] = tuple(nodes)

    def look(self) -> dict[str, Progress]:
        """How far each trial is, by its name."""
        return self._progress

    def stop(self) -> None:
        """Let every trial save a checkpoint and stop."""
        self._stop = True


def open_board() -> Any:  # a Ray actor handle, which Ray does not type
    """Put up a board on this process's node, so that a search outlives the loss of any other."""
    from tunefleet.worker.beside import (
        beside_driver,  # drivers in forks take `Progress` from here, and live without Ray
    )

    return beside_driver(Board)
