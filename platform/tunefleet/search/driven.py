"""The driver of one trial: it follows its run, and makes of what the workers tell what a search is told.

Nothing here needs Ray, so that it drives runs under Ray Train and runs in forks alike.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.record import RESULT
from tunefleet.checkpoints import newest_complete, step_of
from tunefleet.errors import Refused, RunFailed
from tunefleet.launch.runs import claimed, open_run
from tunefleet.plan import Plan
from tunefleet.search.board import Orders, Progress
from tunefleet.search.book import PLANS, Report
from tunefleet.storage import Place, place
from tunefleet.training.progress import read_progress
from tunefleet.worker.events import Evaluated, Event, Logged, Started, Stepped
from tunefleet.worker.failures import Failure, failures, last_failure
from tunefleet_strategies.errors import StrategyError

ENDED, ERROR = "ended", "error"
"""Words of a trial's last result: how it ended ("finished", "failed", "infeasible", "interrupted"), and why."""
RUNG = "rung"
"""Evaluations that a trial has behind it; HyperBand's unit, which has no use for steps between them."""
FIGURES = ("step", "loss", "eval_loss", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds")
"""What of a report is kept."""
SUMMED = ("step", "loss", "eval_loss", "seconds", "tokens", "tokens_per_second")
"""What of it comes from the summary of a run."""
_TELL_SECONDS = 0.5
_FAREWELL_SECONDS = 60.0
"""How long a stopped trial's workers have to save and to end."""


def plan_place(search: Place, name: str) -> Place:
    """Where the plan of a trial is."""
    return search.child(PLANS, f"{name}.json")


def rung(step: int, interval: int) -> int:
    """How many intervals a step has behind it."""
    return max(1, round(step / interval))


@dataclass(frozen=True)
class Leg:
    """The part of a run that it shall train now, where it is one of a population."""

    until: int | None = None
    """The step at which it rests; None = it goes to its end."""
    rested: Report | None = None
    """What it reported there already."""


WHOLE = Leg()


class Run(Protocol):
    """A run under way, as its driver sees it (`launch.running.Running`)."""

    def goes_on(self) -> bool:
        """Wait a little for the run's end. Returns whether it still goes on."""

    def events(self) -> list[Event]:
        """What the workers have told since the last time, oldest first."""

    def stop(self) -> None:
        """Ask the workers to save a checkpoint at the next step and to end."""

    def move(self, nodes: Collection[str]) -> None:
        """Ask the workers to save a checkpoint at the next step, and to go on without these nodes."""

    def summary(self) -> dict[str, Any]:
        """What rank 0 returned.

        Raises:
            Refused: the workers found that the recipe cannot run.
            RunFailed: anything else went wrong.
        """


class Start(Protocol):
    """Starts the workers of a run whose folder is claimed and open."""

    def __call__(self, plan: Plan, storage: Place, folder: RunFolder, command: str, mark: str) -> Run:
        """
        Args:
            command: what repeats the run.
            mark: what `claimed` yielded.
        """


class Driven:
    """A run and what is known of it."""

    def __init__(
        self,
        name: str,
        search: Place,
        evaluates: bool,
        interval: int,
        start: Start,
        tell: Callable[[Progress | None], Orders],
        leg: Leg = WHOLE,
    ) -> None:
        """
        Args:
            evaluates: whether the metric comes with evaluations; else with logged lines.
            interval: steps from one report to the next.
            start: starts it, to train until the leg's end.
            tell: takes how far the trial is; returns what it shall do.
            leg: how far it goes now.
        """
        self._name, self._leg = name, leg
        self._plan = Plan.model_validate_json(plan_place(search, name).read_text())
        self._storage = place(self._plan.place.storage_path)
        self._folder = RunFolder(self._storage.child(name))
        self._evaluates, self._interval = evaluates, interval
        self._start_run, self._tell = start, tell
        self._held = ExitStack()
        self._mark = ""
        self._running: Run | None = None
        self._started = self._stopping = False
        self._nodes: tuple[str, ...] = ()
        self._left: set[str] = set()
        self._goes_on = True
        self._latest: Report = {"step": 0}
        self._due: deque[Report] = deque()
        self._told = 0.0

    def next_result(self) -> dict[str, Any]:
        """Listen to the run until there is something to report."""
        result = self._next_result()
        return {**result, RUNG: rung(int(result["step"]), self._interval)}

    def _next_result(self) -> dict[str, Any]:
        if self._folder.finished():
            return self._finished(json.loads(self._folder.record.child(RESULT).read_text()))
        if self._running is None and self._tell(None).stop:
            return self._ended("interrupted")
        rested = self._rested()
        if rested is not None:
            return rested
        try:
            running = self._running or self._start()
            while not self._due:
                goes_on = self._listen(running)
                if not goes_on and not self._due:
                    return self._end(running)
                if self._stopping and not self._started:
                    return self._ended("interrupted")
            return dict(self._due.popleft())
        except (Refused, StrategyError) as error:
            return self._ended("infeasible", str(error))

    def overhear(self) -> bool:
        """Listen to the run a little before the next result is asked for. Returns whether there is one already."""
        if self._running is not None and not self._due and self._goes_on:
            self._listen(self._running)
        return self._running is None or bool(self._due) or not self._goes_on

    def _listen(self, running: Run) -> bool:
        """Take in what the workers tell. Returns whether the run goes on."""
        self._goes_on = running.goes_on()
        for event in running.events():
            self._hear(event)
        self._keep_in_touch(running)
        return self._goes_on

    def _start(self) -> Run:
        self._mark = self._held.enter_context(claimed(self._folder))
        open_run(self._plan, self._folder)
        command = f"trial {self._name} of a search"
        self._running = self._start_run(self._plan, self._storage, self._folder, command, self._mark)
        return self._running

    def _rested(self) -> dict[str, Any] | None:
        """What a run has to report that is where it shall rest, by the book or by its newest checkpoint."""
        if self._running is not None or self._leg.until is None:
            return None
        if self._leg.rested is not None:
            return dict(self._leg.rested)
        newest, _ = newest_complete(self._folder.checkpoints)
        if newest is None or step_of(newest) < self._leg.until:
            return None
        sums = read_progress(newest).record
        figures = {"loss": sums["last_loss"], **{name: sums[name] for name in ("eval_loss", "seconds", "tokens")}}
        self._take_in({"step": step_of(newest), **figures})
        return dict(self._latest)

    def _hear(self, event: Event) -> None:
        """Take an event in; a new value of the metric is due, but that of the last step waits for the run's end."""
        match event:
            case Started(start_step, _, _, workers):
                self._started = True
                self._nodes = tuple(sorted({worker.node for worker in workers}))
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
        if wanted and self._latest["step"] not in (self._plan.batch.updates, self._leg.until):
            self._due.append(dict(self._latest))

    def _keep_in_touch(self, running: Run) -> None:
        if time.monotonic() - self._told < _TELL_SECONDS:
            return
        self._told = time.monotonic()
        step, updates = int(self._latest["step"] or 0), self._plan.batch.updates or 0
        progress = Progress(step, updates, self._latest.get("loss"), self._nodes)
        orders = self._tell(progress if self._started else None)
        if orders.stop and not self._stopping:
            self._stopping = True
            running.stop()
        elif self._started and set(orders.leave) - self._left:
            self._left |= set(orders.leave)
            running.move(orders.leave)

    def _end(self, running: Run) -> dict[str, Any]:
        """The last result. An error that might not come again is raised, for Tune to begin the trial anew."""
        try:
            summary = running.summary()
        except RunFailed as error:
            failure = last_failure(failures(self._folder.record, self._mark))
            if failure is None or not (failure.final or failure.out_of_memory):
                raise
            return self._ended("infeasible" if failure.out_of_memory else "failed", sentence(failure, error))
        self._running = None
        if summary["stopped"] and summary["step"] == self._leg.until:
            self._held.close()  # whoever goes on with the run need not wait until this process has ended
            self._take_in(summary)
            return dict(self._latest)
        return self._ended("interrupted") if summary["stopped"] else self._finished(summary)

    def _take_in(self, summary: Mapping[str, Any]) -> None:
        figures = {name: summary.get(name) for name in SUMMED}
        self._latest |= {name: value for name, value in figures.items() if value is not None}

    def _finished(self, summary: dict[str, Any]) -> dict[str, Any]:
        """The figures of a whole run: those of the model that is kept."""
        best = self._plan.recipe.run.load_best_model_at_end
        self._take_in(summary | ({"eval_loss": summary.get("best_eval_loss")} if best else {}))
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
