"""The line between a search's driver and its trials: how far each is, and the wish that all of them stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a trial is."""

    step: int
    updates: int
    loss: float | None


class Board:
    """State of the line. Lives in an actor of its own that takes no CPU."""

    def __init__(self) -> None:
        self._progress: dict[str, Progress] = {}
        self._stop = False

    def tell(self, trial: str, progress: Progress | None) -> bool:
        """Note how far a trial is. Returns whether it shall stop."""
        if progress is not None:
            self._progress[trial] = progress
        return self._stop

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
