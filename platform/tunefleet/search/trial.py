"""One trial: an ordinary run, whose driver is an actor of Ray Tune instead of a command.

A class trainable, not a function: Tune calls `cleanup` when it stops or pauses a trial, and there the workers are asked
to save and to end. So Ray Train itself shuts them down and gives their placement group back, and nothing hangs on the
cleaner that would otherwise have to notice a dead driver (ray #54305). Checkpoints are those of the run; what Tune is
handed is a pointer to them.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.tune import Trainable

from tunefleet.launch.running import Running
from tunefleet.search.driven import WHOLE, Driven, Leg
from tunefleet.storage import place
from tunefleet.worker.exits import end_surely


class RunTrial(Trainable):
    """What Ray Tune starts for each trial: the driver of one run."""

    def setup(
        self, config: dict[str, Any], search: str = "", board: Any = None, evaluates: bool = True, interval: int = 1
    ) -> None:
        """Take a trial.

        Args:
            config: `trial`, its name; of a population also `until` and `rested` (`points.configuration`).
            search: where the search's folder is.
            board: the actor of `board.Board`.
            evaluates: whether the metric comes with evaluations; else with logged lines.
            interval: steps from one report to the next.
        """
        end_surely()
        leg = Leg(config.get("until"), config.get("rested"))
        self.driven = driven(config["trial"], search, board, evaluates, interval, leg)

    def step(self) -> dict[str, Any]:
        """Go on until the run has a new value of the metric, or its end."""
        return self.driven.next_result()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Leave a pointer: the run keeps its own checkpoints, and goes on from the newest."""
        (Path(checkpoint_dir) / "run.json").write_text(json.dumps(self.driven.pointer()))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """The run finds its newest checkpoint by itself."""

    def cleanup(self) -> None:
        """Tune stops or pauses the trial, or it has ended."""
        self.driven.close()


def driven(name: str, search: str, board: Any, evaluates: bool, interval: int, leg: Leg = WHOLE) -> Driven:
    """The driver of a trial whose workers Ray Train starts. Arguments as in `RunTrial.setup`."""
    return Driven(
        name,
        place(search),
        evaluates,
        interval,
        partial(Running, until=leg.until),
        lambda progress: ray.get(board.tell.remote(name, progress)),
        leg,
    )
