"""One trial: an ordinary run, whose driver is an actor of Ray Tune instead of a command.

A class trainable, not a function: Tune calls `cleanup` when it stops or pauses a trial, and there the workers are asked
to save and to end. So Ray Train itself shuts them down and gives their placement group back, and nothing hangs on the
cleaner that would otherwise have to notice a dead driver (ray #54305). Checkpoints are those of the run; what Tune is
handed is a pointer to them.
"""

from __future__ import annotations

import json
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray.tune import Trainable

from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.record import RESULT
from tunefleet.errors import Refused, RunFailed
from tunefleet.launch.runs import claimed, open_run
from tunefleet.launch.train import Running
from tunefleet.plan import Plan
from tunefleet.search.board import Progress
from tunefleet.search.book import PLANS, Report
from tunefleet.search.schedulers import RUNG, rung
from tunefleet.storage import Place, place
from tunefleet.worker.events import Evaluated, Event, Logged, Started, Stepped
from tunefleet.worker.failures import Failure, failures, last_failure
from tunefleet_strategies.contract import StrategyError

ENDED, ERROR = "ended", "error"
"""Words of a trial's last result: how it ended ("finished", "failed", "infeasible", "interrupted"), and why."""
FIGURES = ("step", "loss", "eval_loss", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds")
"""What of a report is kept."""
OUT_OF_MEMORY = "OutOfMemoryError"
_TELL_SECONDS = 0.5
_FAREWELL_SECONDS = 60.0
"""How long a stopped trial's workers have to save and to end."""


def plan_place(search: Place, name: str) -> Place:
    """Where the plan of a trial is."""
    return search.child(PLANS, f"{name}.json")


class RunTrial(Trainable):
    """What Ray Tune starts for each trial: the driver of one run."""

    def setup(
        self, config: dict[str, Any], search: str = "", board: Any = None, evaluates: bool = True, interval: int = 1
    ) -> None:
        """Take a trial.

        Args:
            config: `trial`, its name.
            search: where the search's folder is.
            board: the actor of `board.Board`.
            evaluates: whether the metric comes with evaluations; else with logged lines.
            interval: steps from one report to the next.
        """
        self.driven = Driven(config["trial"], place(search), board, evaluates)
        self._interval = interval

    def step(self) -> dict[str, Any]:
        """Go on until the run has a new value of the metric, or its end."""
        result = self.driven.next_result()
        return {**result, RUNG: rung(int(result["step"]), self._interval)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Leave a pointer: the run keeps its own checkpoints, and goes on from the newest."""
        (Path(checkpoint_dir) / "run.json").write_text(json.dumps(self.driven.pointer()))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """The run finds its newest checkpoint by itself."""

    def cleanup(self) -> None:
        """Tune stops or pauses the trial, or it has ended."""
        self.driven.close()


class Driven:
    """A run and what is known of it."""

    def __init__(self, name: str, search: Place, board: Any, evaluates: bool) -> None:
        self._name = name
        self._plan = Plan.model_validate_json(plan_place(search, name).read_text())
        self._storage = place(self._plan.place.storage_path)
        self._folder = RunFolder(self._storage.child(name))
        self._board, self._evaluates = board, evaluates
        self._held = ExitStack()
        self._mark = ""
        self._running: Running | None = None
        self._started = self._stopping = False
        self._latest: Report = {"step": 0}
        self._due: deque[Report] = deque()
        self._told = 0.0

    def next_result(self) -> dict[str, Any]:
        """Listen to the run until there is something to report."""
        if self._folder.finished():
            return self._finished(json.loads(self._folder.record.child(RESULT).read_text()))
        if self._running is None and ray.get(self._board.tell.remote(self._name, None)):
            return self._ended("interrupted")
        try:
            running = self._running or self._start()
            while not self._due:
                goes_on = running.goes_on()
                for event in running.events():
                    self._hear(event)
                self._keep_in_touch(running)
                if not goes_on and not self._due:
                    return self._end(running)
                if self._stopping and not self._started:
                    return self._ended("interrupted")
            return dict(self._due.popleft())
        except (Refused, StrategyError) as error:
            return self._ended("infeasible", str(error))

    def _start(self) -> Running:
        self._mark = self._held.enter_context(claimed(self._folder))
        open_run(self._plan, self._folder)
        self._running = Running(self._plan, self._storage, self._folder, f"trial {self._name} of a search", self._mark)
        return self._running

    def _hear(self, event: Event) -> None:
        """Take an event in; a new value of the metric is due, but that of the last step waits for the run's end."""
        match event:
            case Started(start_step, _, _):
                self._started = True
                self._latest["step"] = start_step
            case Stepped(step):
                self._latest["step"] = step.step
            case Logged(line):
                self._latest |= {key: value for key, value in line.items() if key in FIGURES}
                self._report(not self._evaluates)
            case Evaluated(step_number, loss):
                self._latest |= {"step": step_number, "eval_loss": loss}
                self._report(self._evaluates and step_number > 0)

    def _report(self, wanted: bool) -> None:
        if wanted and self._latest["step"] != self._plan.batch.updates:
            self._due.append(dict(self._latest))

    def _keep_in_touch(self, running: Running) -> None:
        if time.monotonic() - self._told < _TELL_SECONDS:
            return
        self._told = time.monotonic()
        progress = Progress(int(self._latest["step"] or 0), self._plan.batch.updates or 0, self._latest.get("loss"))
        if ray.get(self._board.tell.remote(self._name, progress if self._started else None)) and not self._stopping:
            self._stopping = True
            running.stop()

    def _end(self, running: Running) -> dict[str, Any]:
        """The last result. An error that might not come again is raised, for Tune to begin the trial anew."""
        try:
            summary = running.summary()
        except RunFailed as error:
            failure = last_failure(failures(self._folder.record, self._mark))
            if failure is None or not (failure.final or failure.kind == OUT_OF_MEMORY):
                raise
            return self._ended("infeasible" if failure.kind == OUT_OF_MEMORY else "failed", sentence(failure, error))
        self._running = None
        return self._ended("interrupted") if summary["stopped"] else self._finished(summary)

    def _finished(self, summary: dict[str, Any]) -> dict[str, Any]:
        """The figures of a whole run: those of the model that is kept."""
        best = self._plan.recipe.run.load_best_model_at_end
        names = {"eval_loss": "best_eval_loss" if best else "eval_loss"}
        wanted = ("step", "loss", "eval_loss", "seconds", "tokens", "tokens_per_second")
        figures = {name: summary.get(names.get(name, name)) for name in wanted}
        self._latest |= {name: value for name, value in figures.items() if value is not None}
        return self._ended("finished")

    def _ended(self, how: str, error: str | None = None) -> dict[str, Any]:
        return {**self._latest, ENDED: how, ERROR: error, "done": True}

    def pointer(self) -> dict[str, Any]:
        """Where the run is, and how far."""
        return {"run": self._folder.root.uri, **self._latest}

    def close(self) -> None:
        """End the workers, with a checkpoint if they train, and wait until Ray Train has given their place back."""
        running = self._running
        if running is not None:
            running.stop()
            until = time.monotonic() + _FAREWELL_SECONDS
            while self._started and running.goes_on() and time.monotonic() < until:
                pass
        self._held.close()


def sentence(failure: Failure, error: object = None) -> str:
    """What a trial died of."""
    return f"step {failure.step}: {failure.message or error}"
