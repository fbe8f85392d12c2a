"""What a person sees while a run goes on: one progress line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tunefleet.artifacts.metrics import WORKERS, Line
from tunefleet.launch.draft import Stages
from tunefleet.worker.events import Evaluated, Event, Logged, Noticed, Saved, Started, Stepped

_STARTING = "starting the workers"
_MUCH_WAITING = 0.1
"""Share of the step that a worker waits for data from which it is worth a word."""


class Display(Protocol):
    """Shows events as they come."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, event: Event) -> None: ...

    def note(self, text: str) -> None: ...

    def preparing(self) -> AbstractContextManager[Stages]:
        """Show how far the stages before the start have come, while the block lasts."""


def open_display(console: Console) -> Display:
    """The display that fits where the output goes."""
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


def figures(loss: float | None, rate: float | None, tokens_per_second: float | None, mfu: float | None) -> str:
    """The figures of a step or a line, as short as they can be read."""
    parts = [
        "loss n/a" if loss is None else f"loss {loss:.4f}",
        "" if rate is None else f"lr {rate:.2e}",
        "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tok/s",
        "" if mfu is None else f"mfu {mfu:.0%}",
    ]
    return "  ".join(part for part in parts if part)


def worker_figures(line: Line) -> str:
    """Of the workers, what a person can act on: the most memory that one held, and long waits for data."""
    workers = line.get(WORKERS)
    if workers is None:
        return ""
    shares = [
        wait / step if step else 0.0
        for wait, step in zip(workers["data_wait_seconds"], workers["step_seconds"], strict=True)
    ]
    memory = f"{max(workers['memory_peak_bytes']) / 2**30:.1f} GiB"
    return f"{memory}  waits for data {max(shares):.0%}" if max(shares) >= _MUCH_WAITING else memory


class LiveDisplay:
    """One rich progress line; notices, evaluations and checkpoints scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(_STARTING, total=None, figures="")
        self._workers = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def preparing(self) -> Iterator[Stages]:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, console=self._console, transient=True) as bars:

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield show

    def note(self, text: str) -> None:
        # Notices quote what people wrote: rich shall read no markup and no emoji into them.
        self._progress.console.print(f"[yellow]note[/] {escape(text)}", highlight=False, emoji=False)

    def show(self, event: Event) -> None:
        match event:
            case Started(start_step, updates, world_size):
                workers = "1 worker" if world_size == 1 else f"{world_size} workers"
                self._progress.reset(
                    self._task, description=f"training ({workers})", total=updates, completed=start_step
                )
            case Stepped(step):
                shown = figures(step.loss, step.learning_rate, step.tokens_per_second, step.mfu)
                self._progress.update(self._task, completed=step.step, figures=f"{shown}  {self._workers}".rstrip())
            case Logged(line):
                self._workers = worker_figures(line)
            case Evaluated(step_number, loss):
                self._progress.console.print(f"step {step_number}: eval_loss {loss:.4f}", highlight=False)
            case Saved(step_number):
                self._progress.console.print(f"step {step_number}: checkpoint saved", style="dim", highlight=False)
            case Noticed(text):
                self.note(text)


class LineDisplay:
    """Plain lines for logs and pipes: one for each line of `metrics.jsonl`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._updates = 0

    def __enter__(self) -> Self:
        self._print(_STARTING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @contextmanager
    def preparing(self) -> Iterator[Stages]:
        def show(stage: str, done: int, total: int) -> None:
            if done == total:
                self._print(f"{stage}: {total:,} done")

        yield show

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def show(self, event: Event) -> None:
        match event:
            case Started(start_step, updates, world_size):
                self._updates = updates
                self._print(f"{world_size} worker(s) ready; step {start_step} of {updates}")
            case Logged(line):
                shown = figures(line["loss"], line["learning_rate"], line["tokens_per_second"], line["mfu"])
                self._print(f"step {line['step']}/{self._updates}  {shown}  {worker_figures(line)}".rstrip())
            case Evaluated(step_number, loss):
                self._print(f"step {step_number}: eval_loss {loss:.4f}")
            case Saved(step_number):
                self._print(f"step {step_number}: checkpoint saved")
            case Noticed(text):
                self.note(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
