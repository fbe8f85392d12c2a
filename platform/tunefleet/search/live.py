"""What a person sees of a search: the plan, then one table that lives on a terminal, and plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunefleet.launch.display import open_display
from tunefleet.launch.draft import Stages
from tunefleet.search.board import Progress
from tunefleet.search.book import Book, State, Trial
from tunefleet.search.domains import in_words, word
from tunefleet.search.trials import BranchPlan

COLOURS: Mapping[State, str] = {
    "waiting": "dim",
    "running": "bold",
    "paused": "dim",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "infeasible": "magenta",
    "cut": "yellow",
}
MOST_ROWS = 30
"""Rows of the living table; of more trials those that have ended longest ago are left out."""


class SearchDisplay(Protocol):
    """Shows a search."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def preparing(self) -> AbstractContextManager[Stages]:
        """Show how far the stages before the start have come, while the block lasts."""

    def note(self, text: str) -> None: ...

    def show_plan(self, plans: Sequence[BranchPlan], book: Book, trials: int, at_once: int) -> None:
        """Show the space and what its trials will take."""

    def update(self, book: Book, progress: Mapping[str, Progress]) -> None:
        """Show where the trials are."""


def open_search_display(console: Console, metric: str) -> SearchDisplay:
    """The display that fits where the output goes."""
    return TableDisplay(console, metric) if console.is_terminal else TrialLines(console, metric)


def plan_table(plans: Sequence[BranchPlan]) -> Table:
    """One line a branch: what is fixed, what is searched, on how many workers."""
    hosted = any(one.host for one in plans)
    columns = ("branch", "fixed", "searched", "workers", "global batch", *(("host",) if hosted else ()))
    table = Table(*columns, title="the space", title_justify="left")
    for one in plans:
        branch, batch = one.branch, one.plan.batch
        fixed = "\n".join(f"{key}: {word(value)}" for key, value in branch.fixed.items())
        searched = "\n".join(f"{key}: {in_words(domain)}" for key, domain in branch.domains.items())
        counts = " or ".join(str(count) for count in one.workers)
        table.add_row(
            Text(branch.name),
            Text(fixed),
            Text(searched or "nothing"),
            Text(f"{counts} ({one.why})" if one.why else counts),
            f"{batch.global_batch_samples} samples",
            *((one.host,) if hosted else ()),
        )
    return table


def sampled(trial: Trial) -> str:
    """What was sampled for a trial, in one line."""
    values = trial.values if trial.seed is None else {**trial.values, "seed": trial.seed}
    return ", ".join(f"{key}: {word(value)}" for key, value in values.items()) or "nothing"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def remaining(book: Book, trials: int) -> float | None:
    """Seconds until the end, if trials go on to take as long as those so far; None before the first has ended."""
    ended = sum(trial.ended for trial in book.trials)
    return None if ended == 0 else book.elapsed() / ended * max(0, trials - ended)


class _Shown:
    """What both displays say once."""

    def __init__(self, console: Console, metric: str) -> None:
        self._console, self._metric = console, metric
        self._trials = 0

    def preparing(self) -> AbstractContextManager[Stages]:
        return open_display(self._console).preparing()

    def note(self, text: str) -> None:
        self._console.print(f"[yellow]note[/] {escape(text)}", highlight=False, emoji=False, soft_wrap=True)

    def show_plan(self, plans: Sequence[BranchPlan], book: Book, trials: int, at_once: int) -> None:
        self._trials = trials
        self._console.print(plan_table(plans))
        updates = plans[0].plan.batch.updates
        self._console.print(
            f"{trials} trials of {updates} steps, at most {at_once} at once"
            + (f"; {sum(trial.ended for trial in book.trials)} have ended before" if book.trials else ""),
            highlight=False,
        )


class TableDisplay(_Shown):
    """One table, drawn again and again."""

    def __init__(self, console: Console, metric: str) -> None:
        super().__init__(console, metric)
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, book: Book, progress: Mapping[str, Progress]) -> None:
        self._live.update(trials_table(book, progress, self._metric, self._trials), refresh=True)


def trials_table(book: Book, progress: Mapping[str, Progress], metric: str, trials: int) -> Table:
    """Every trial with what was sampled and where it is."""
    left = remaining(book, trials)
    eta = "" if left is None else f", about {duration(left)} to go"
    ended = sum(trial.ended for trial in book.trials)
    table = Table(title=f"{ended} of {trials} trials have ended, {duration(book.elapsed())}{eta}", title_justify="left")
    for name in ("", "method", "sampled", "step", "loss", metric, "state", "time"):
        table.add_column(name, justify="right" if name in ("", "step", "loss", metric, "time") else "left")
    shown = [trial for trial in book.trials if not trial.ended]
    shown += [trial for trial in reversed(book.trials) if trial.ended][: max(0, MOST_ROWS - len(shown))]
    for trial in sorted(shown, key=lambda one: one.number):
        now = progress.get(trial.name)
        going = now is not None and not trial.ended
        step = now.step if going and now is not None else trial.steps
        loss = now.loss if going and now is not None else trial.last("loss")
        table.add_row(
            str(trial.number),
            Text(trial.branch_name),
            Text(sampled(trial)),
            f"{step}/{trial.updates or '?'}",
            _figure(loss),
            _figure(trial.last(metric)),
            Text(trial.state, style=COLOURS[trial.state]),
            duration(trial.seconds),
        )
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


class TrialLines(_Shown):
    """Plain lines for logs and pipes: one for each report and each change of state."""

    def __init__(self, console: Console, metric: str) -> None:
        super().__init__(console, metric)
        self._told: dict[str, tuple[State, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def update(self, book: Book, progress: Mapping[str, Progress]) -> None:
        for trial in book.trials:
            now = (trial.state, len(trial.reports))
            if self._told.get(trial.name) == now:
                continue
            new = trial.name not in self._told
            self._told[trial.name] = now
            what = f" ({trial.branch_name}; {sampled(trial)}; {trial.workers} worker(s))" if new else ""
            value = trial.last(self._metric)
            figures = "" if value is None else f"  step {trial.steps}/{trial.updates}  {self._metric} {value:.4f}"
            error = f": {trial.error}" if trial.error else ""
            self._print(f"trial {trial.number} {trial.state}{what}{figures}{error}")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
