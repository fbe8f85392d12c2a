"""What a person sees while a run goes on: one progress line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tunefleet.training.loop import Step
from tunefleet.worker.events import Evaluated, Event, Noticed, Saved, Started, Stepped


class Display(Protocol):
    """Shows events as they come."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, event: Event) -> None: ...

    def note(self, text: str) -> None: ...


def open_display(console: Console, logging_steps: int) -> Display:
    """The display that fits where the output goes."""
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console, logging_steps)


def figures(step: Step) -> str:
    """The figures of one step, as short as they can be read."""
    text = f"loss {step.loss:.4f}  lr {step.learning_rate:.2e}  {step.tokens_per_second:,.0f} tok/s"
    return text if step.mfu is None else f"{text}  mfu {step.mfu:.0%}"


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
        self._task = self._progress.add_task("starting Ray", total=None, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._progress.console.print(f"[yellow]note[/] {text}", highlight=False)

    def show(self, event: Event) -> None:
        match event:
            case Started(start_step, updates, world_size):
                workers = "1 worker" if world_size == 1 else f"{world_size} workers"
                self._progress.reset(
                    self._task, description=f"training ({workers})", total=updates, completed=start_step
                )
            case Stepped(step):
                self._progress.update(self._task, completed=step.step, figures=figures(step))
            case Evaluated(step_number, loss):
                self._progress.console.print(f"step {step_number}: eval_loss {loss:.4f}", highlight=False)
            case Saved(step_number):
                self._progress.console.print(f"step {step_number}: checkpoint saved", style="dim", highlight=False)
            case Noticed(text):
                self.note(text)


class LineDisplay:
    """Plain lines for logs and pipes: one every `logging_steps` updates."""

    def __init__(self, console: Console, logging_steps: int) -> None:
        self._console = console
        self._logging_steps = logging_steps
        self._updates = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def show(self, event: Event) -> None:
        match event:
            case Started(start_step, updates, world_size):
                self._updates = updates
                self._print(f"{world_size} worker(s) ready; step {start_step} of {updates}")
            case Stepped(step):
                if step.step % self._logging_steps == 0 or step.step == self._updates:
                    self._print(f"step {step.step}/{self._updates}  {figures(step)}")
            case Evaluated(step_number, loss):
                self._print(f"step {step_number}: eval_loss {loss:.4f}")
            case Saved(step_number):
                self._print(f"step {step_number}: checkpoint saved")
            case Noticed(text):
                self.note(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
