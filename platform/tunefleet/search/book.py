"""The book of a search: every trial with what was sampled, what it reported and how it ended. Kept in storage.

It is the truth of a search: a command that goes on reads it, and tables, plots and `trials.parquet` are made from it.
Written whole and atomically at each change, so that whatever kills the driver leaves a book that is true.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, TypedDict

from pydantic import JsonValue

from tunefleet.errors import Refused
from tunefleet.search.space import Point
from tunefleet.storage import Place

BOOK, SEARCHER = "trials.json", "searcher.state"
PLANS, RUNS = "plans", "trials"
"""Folders of a search: the plan of each trial, and its run."""
State = Literal["waiting", "running", "paused", "finished", "stopped", "failed", "infeasible", "cut"]
"""paused: until the scheduler lets it go on; stopped: by the scheduler; cut: by the end of the budget; infeasible: it
cannot run here."""
ENDED: frozenset[State] = frozenset({"finished", "stopped", "failed", "infeasible", "cut"})
Report = dict[str, float | int | None]
"""Figures of a trial at one of its steps, `step` among them."""


class Exploit(TypedDict):
    """A trial takes over the state of a better one, and goes on with changed values."""

    step: int
    donor: int
    """The other one's number."""
    before: dict[str, JsonValue]
    """Its own values until then."""
    values: dict[str, JsonValue]
    """Those that it goes on with."""


@dataclass
class Trial:
    """One trial."""

    number: int
    name: str
    """Its run: the folder below `trials/`."""
    branch: int
    branch_name: str
    method: str
    values: dict[str, JsonValue]
    digest: str
    workers: int
    state: State = "waiting"
    reports: list[Report] = field(default_factory=list)
    steps: int = 0
    """Updates that its model has seen."""
    updates: int | None = None
    """Updates of a whole trial."""
    seconds: float = 0.0
    """In this state and those before, since its first start."""
    error: str | None = None
    repeats: int | None = None
    """The number of the trial that it repeats under another seed; None where it was sampled."""
    seed: int | None = None
    """Its own, if it repeats another."""
    until: int | None = None
    """Of a population: the step that it may train to before it is compared; None = to its end."""
    exploits: list[Exploit] = field(default_factory=list)
    """Of a population: each time that it took over another one's state."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def last(self, metric: str) -> float | None:
        """The newest value of a metric."""
        found = (report[metric] for report in reversed(self.reports) if report.get(metric) is not None)
        return next(found, None)

    def report_at(self, step: int) -> Report | None:
        """What it reported at a step."""
        return next((report for report in self.reports if report["step"] == step), None)

    def point(self) -> Point:
        return Point(self.branch, self.values, self.digest, self.seed)


class Book:
    """All trials of a search, in the order in which they were chosen."""

    def __init__(self, folder: Place) -> None:
        """Open the book of a search, or begin one."""
        self._folder = folder
        self.trials: list[Trial] = []
        self.searched: dict[str, JsonValue] = {}
        """The search that it is of."""
        self.seconds = 0.0
        """All calls of the command together, until `_since`."""
        self.complete = False
        """Whether the search went to its end."""
        self._since = time.monotonic()
        if folder.child(BOOK).exists():
            self._read()

    def _read(self) -> None:
        try:
            kept = json.loads(self._folder.child(BOOK).read_text())
            self.trials = [Trial(**one) for one in kept["trials"]]
            self.searched, self.seconds, self.complete = kept["search"], kept["seconds"], kept["complete"]
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(
                f"{self._folder.child(BOOK).uri} is damaged, so the search cannot go on: choose another ray_run_name, "
                f"or write resume_from_checkpoint: false to begin anew."
            ) from error

    def elapsed(self) -> float:
        """Seconds that the search has taken, over all calls of the command."""
        return self.seconds + time.monotonic() - self._since

    def save(self) -> None:
        """Write the book."""
        kept = {
            "search": self.searched,
            "seconds": self.elapsed(),
            "complete": self.complete,
            "trials": [asdict(trial) for trial in self.trials],
        }
        self._folder.child(BOOK).write_text(json.dumps(kept, indent=1))

    def add(
        self,
        point: Point,
        branch_name: str,
        method: str,
        workers: int,
        updates: int | None,
        repeats: int | None = None,
    ) -> Trial:
        """Take a new trial in."""
        number = len(self.trials) + 1
        trial = Trial(
            number=number,
            name=f"trial_{number:04d}_{point.digest}",
            branch=point.branch,
            branch_name=branch_name,
            method=method,
            values=dict(point.values),
            digest=point.digest,
            workers=workers,
            updates=updates,
            repeats=repeats,
            seed=point.seed,
        )
        self.trials.append(trial)
        return trial

    def named(self, name: str) -> Trial:
        """The trial of a run.

        Raises:
            KeyError: there is none.
        """
        for trial in self.trials:
            if trial.name == name:
                return trial
        raise KeyError(name)

    def twin(self, point: Point) -> Trial | None:
        """The trial that has the same recipe, if there is one."""
        return next((trial for trial in self.trials if trial.digest == point.digest), None)

    @property
    def sampled(self) -> list[Trial]:
        """Trials of points that were sampled: all but repeats under other seeds."""
        return [trial for trial in self.trials if trial.repeats is None]

    @property
    def open_trials(self) -> list[Trial]:
        """Trials that have not ended."""
        return [trial for trial in self.trials if not trial.ended]

    def searcher_state(self) -> bytes | None:
        """What the searcher kept, as `keep_searcher_state` took it."""
        file = self._folder.child(SEARCHER)
        return base64.b64decode(file.read_text()) if file.exists() else None

    def keep_searcher_state(self, state: bytes) -> None:
        """Keep what the searcher has learned."""
        self._folder.child(SEARCHER).write_text(base64.b64encode(state).decode())


def best(trials: list[Trial], metric: str, mode: str) -> Trial | None:
    """The best of the trials that went to their end, by what they reported last; the first of equals."""
    whole = [trial for trial in trials if trial.state == "finished" and trial.last(metric) is not None]
    sign = 1.0 if mode == "min" else -1.0
    return min(whole, key=lambda trial: sign * float(trial.last(metric) or 0.0), default=None)


def front(trials: list[Trial], directions: Mapping[str, str]) -> list[Trial]:
    """The finished trials that no other is at least as good as in every metric and better in one."""

    def score(trial: Trial) -> tuple[float, ...]:
        return tuple(
            (1.0 if mode == "min" else -1.0) * float(trial.last(name) or 0.0) for name, mode in directions.items()
        )

    whole = [
        trial
        for trial in trials
        if trial.state == "finished" and all(trial.last(name) is not None for name in directions)
    ]
    return [
        one
        for one in whole
        if not any(
            score(other) != score(one) and all(a <= b for a, b in zip(score(other), score(one), strict=True))
            for other in whole
        )
    ]
