"""`tunefleet ps`: the runs and searches below a storage path, straight from their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.metrics import METRICS, Line, metrics_of
from tunefleet.artifacts.record import ATTEMPTS
from tunefleet.commands.columns import name_column
from tunefleet.errors import Refused
from tunefleet.launch.runs import PLAN
from tunefleet.plan import Plan
from tunefleet.search.book import BOOK, Book, best
from tunefleet.storage import Place
from tunefleet.stores import reason

State = Literal["planned", "running", "silent", "stopped", "failed", "finished", "unreadable"]
"""silent: nothing says that it ended, and nothing was written for SILENT_SECONDS."""
SILENT_SECONDS = 900.0
COLOURS: dict[State, str] = {
    "finished": "green",
    "running": "cyan",
    "silent": "yellow",
    "failed": "red",
    "unreadable": "red",
    "planned": "dim",
    "stopped": "yellow",
}


@dataclass(frozen=True)
class Overview:
    """One run or search."""

    name: str
    uri: str
    kind: Literal["run", "search"]
    state: State
    why: str | None = None
    """What it failed of, or what cannot be read."""
    method: str | None = None
    done: int | None = None
    """Steps of a run, ended trials of a search."""
    of: int | None = None
    metric: str | None = None
    best: float | None = None
    last_word: datetime | None = None
    """When something of it was written last."""


def overviews(storage: Place, now: datetime | None = None) -> list[Overview]:
    """Every run and search right below a storage path, by name.

    Args:
        now: what silence is counted to; None = the present.

    Raises:
        Refused: there is no such folder, or it cannot be listed.
        StoreFailed: the store cannot be read.
    """
    if not storage.exists():
        raise Refused(f"{storage.uri} does not exist: name the ray_storage_path of your recipes.")
    try:
        children = storage.children()
    except OSError as error:
        raise Refused(f"{storage.uri} cannot be listed ({reason(error)}): name a folder that holds runs.") from error
    found: list[Overview] = []
    for child in children:
        if child.child(BOOK).exists():
            found.append(_of_search(child, now or datetime.now(UTC)))
        elif RunFolder(child).record.exists():
            found.append(_of_any_run(RunFolder(child), now or datetime.now(UTC)))
    return found


def _of_any_run(folder: RunFolder, now: datetime) -> Overview:
    """A run whose record may be damaged in any way, which must not hide the others."""
    try:
        return _of_run(folder, now)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        why = f"its record is damaged ({type(error).__name__}: {reason(error)})"
        return Overview(folder.root.name, folder.root.uri, "run", "unreadable", why=why)


def _of_run(folder: RunFolder, now: datetime) -> Overview:
    root, record = folder.root, folder.record
    attempts = [json.loads(line) for line in _text(record.child(ATTEMPTS)).splitlines()]
    lines = metrics_of(_text(record.child(METRICS)).encode())
    plan_text = _text(record.child(PLAN))
    plan = Plan.model_validate_json(plan_text) if plan_text else None
    last_word = max(
        (time for time in (record.child(name).changed() for name in (METRICS, ATTEMPTS, PLAN)) if time is not None),
        default=None,
    )
    state, why = _state(folder, attempts, _is_silent(last_word, now))
    metric, value = _best(lines)
    steps = [*(line["step"] for line in lines), *(attempt.get("end_step") for attempt in attempts)]
    return Overview(
        root.name,
        root.uri,
        "run",
        state,
        why=why,
        method=None if plan is None else plan.recipe.method.label(),
        done=max((int(step or 0) for step in steps), default=0),
        of=None if plan is None else plan.batch.updates,
        metric=metric,
        best=value,
        last_word=last_word,
    )


def _state(folder: RunFolder, attempts: Sequence[dict[str, Any]], silent: bool) -> tuple[State, str | None]:
    if folder.finished():
        return "finished", None
    if not attempts:
        return "planned", None
    ending = str(attempts[-1]["reason"])
    if ending.startswith("failed"):
        return "failed", ending.partition(": ")[2] or None
    if ending == "running":
        return ("silent", None) if silent else ("running", None)
    return "stopped", None


def _best(lines: Sequence[Line]) -> tuple[str | None, float | None]:
    """The lowest held-out loss; where nothing was evaluated, the newest training loss."""
    evaluated = [float(line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    if evaluated:
        return "eval_loss", min(evaluated)
    trained = [float(line["loss"]) for line in lines if line.get("loss") is not None]
    return ("loss", trained[-1]) if trained else (None, None)


def _of_search(folder: Place, now: datetime) -> Overview:
    try:
        book = Book(folder)
    except Refused as error:
        return Overview(folder.name, folder.uri, "search", "unreadable", why=str(error))
    metric, mode = (_first(book.searched.get(f"tune.{key}")) for key in ("metric", "mode"))
    found = best(book.sampled, str(metric), str(mode)) if metric is not None else None
    last_word = folder.child(BOOK).changed()
    under_way = any(trial.state == "running" for trial in book.trials)
    state: State = "finished" if book.complete else "stopped"
    if not book.complete and under_way:
        state = "silent" if _is_silent(last_word, now) else "running"
    return Overview(
        folder.name,
        folder.uri,
        "search",
        state,
        method=", ".join(dict.fromkeys(trial.method for trial in book.trials)) or None,
        done=sum(trial.ended for trial in book.trials),
        of=len(book.trials),
        metric=None if metric is None else str(metric),
        best=None if found is None else found.last(str(metric)),
        last_word=last_word,
    )


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else value


def _text(file: Place) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _is_silent(last_word: datetime | None, now: datetime) -> bool:
    return last_word is not None and (now - last_word).total_seconds() > SILENT_SECONDS


def overview_table(found: Sequence[Overview], now: datetime) -> Table:
    """As `tunefleet ps` shows them."""
    name = name_column("name", (one.name for one in found))
    table = Table(name, "method", "state", "done", "best", "last word")
    for one in found:
        state = Text(one.state, style=COLOURS[one.state])
        if one.why:
            state.append(f": {one.why}", style="default")
        unit = "trials" if one.kind == "search" else "steps"
        done = "" if one.done is None else f"{one.done}/{one.of if one.of is not None else '?'} {unit}"
        figure = "" if one.best is None else f"{one.metric} {one.best:.4f}"
        age = "" if one.last_word is None else _age((now - one.last_word).total_seconds())
        table.add_row(Text(one.name), one.method or "", state, done, figure, age)
    return table


def _age(seconds: float) -> str:
    """A span of time in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
