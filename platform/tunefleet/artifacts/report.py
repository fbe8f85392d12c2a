"""What a person looks at when a run is over: the loss plot and the summary table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunefleet.artifacts.metrics import Line, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

RAW, SMOOTH, EVALUATED = "#9db7d5", "#1f5fa8", "#d1491f"
SMOOTH_FROM = 8
"""Fewer points than this are shown as they are."""


def loss_plot(metrics: Path, image: Path) -> bool:
    """Draw training and evaluation loss over the steps. Returns False, and draws nothing, where there is no loss yet.

    Args:
        metrics: a `metrics.jsonl`.
        image: the PNG to write.
    """
    lines = read_metrics(metrics)
    training, evaluation = _points(lines, "loss"), _points(lines, "eval_loss")
    if not training and not evaluation:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever the person's settings say
    axes: Axes = figure.add_subplot()
    _draw_training(axes, training)
    if evaluation:
        axes.plot(*_columns(evaluation), color=EVALUATED, marker="o", markersize=4.5, linewidth=1.2, label="evaluation")
        # The last value is what a reader looks for.
        step, loss = evaluation[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), (0, 7), textcoords="offset points", color=EVALUATED, ha="center")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per target token)")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03, y=0.1)
    axes.legend(frameon=False)
    figure.savefig(image, format="png", dpi=130)
    return True


def _draw_training(axes: Axes, training: Sequence[tuple[float, float]]) -> None:
    if not training:
        return
    steps, losses = _columns(training)
    if len(losses) < SMOOTH_FROM:
        axes.plot(steps, losses, color=SMOOTH, marker="o", markersize=3.5, linewidth=1.6, label="training")
        return
    axes.plot(steps, losses, color=RAW, linewidth=1.0, label="training, as logged")
    axes.plot(steps, smoothed(losses), color=SMOOTH, linewidth=2.0, label="training, smoothed")


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average over about a tenth of the points, without the pull towards its start."""
    weight = 1.0 - 2.0 / (max(len(losses) / 10, 3.0) + 1.0)
    averages: list[float] = []
    total = mass = 0.0
    for loss in losses:
        total = weight * total + loss
        mass = weight * mass + 1.0
        averages.append(total / mass)
    return averages


def _points(lines: Sequence[Line], key: str) -> list[tuple[float, float]]:
    """(step, value) of each line that has the value."""
    found = ((line["step"], line.get(key)) for line in lines)
    return [(float(step), float(value)) for step, value in found if step is not None and value is not None]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("step", "steps", "{:,.0f}".format),
    ("loss", "training loss, last line", "{:.4f}".format),
    ("first_eval_loss", "evaluation loss, first", "{:.4f}".format),
    ("eval_loss", "evaluation loss, last", "{:.4f}".format),
    ("best_eval_loss", "evaluation loss, best", "{:.4f}".format),
    ("best_step", "best step", "{:,.0f}".format),
    ("tokens", "tokens trained on", "{:,.0f}".format),
    ("seconds", "time in steps", _duration),
    ("tokens_per_second", "tokens per second", "{:,.0f}".format),
    ("attempts", "attempts", "{:,.0f}".format),
)


def summary_table(summary: Mapping[str, object]) -> Table:
    """The numbers of `Recorder.summary` (or of result.json) as a table; what is not known has no row."""
    from rich.table import Table

    table = Table(title="Result", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for key, label, shown in ROWS:
        value = summary.get(key)
        if isinstance(value, int | float):
            table.add_row(label, shown(value))
    return table
