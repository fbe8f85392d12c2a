"""Two pictures of a search: what was found trial by trial, and every trial's curve. A branch has one colour in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunefleet.search.book import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#d1491f", "#2f8f4e", "#8a4fa3", "#b8860b", "#3aa0a8", "#7a7a7a", "#c2417c")


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever the person's settings say
    axes: Axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(trials: Sequence[Trial]) -> Mapping[str, str]:
    names = dict.fromkeys(trial.branch_name for trial in trials)
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}


def best_so_far_plot(trials: Sequence[Trial], metric: str, mode: str, image: Path) -> None:
    """Each trial's last value (hollow where it did not go to its end), and the best of the whole ones up to it."""
    figure, axes = _figure()
    for name, colour in _colours(trials).items():
        for state, face in (("whole", colour), ("stopped before the end", "none")):
            shown = [
                (trial.number, value)
                for trial in trials
                if trial.branch_name == name
                and (trial.state == "finished") == (state == "whole")
                and (value := trial.last(metric)) is not None
            ]
            if shown:
                label = name if state == "whole" else f"{name}, {state}"
                numbers, values = zip(*shown, strict=True)
                axes.scatter(numbers, values, edgecolors=colour, facecolors=face, s=28, label=label, zorder=3)
    axes.step(*best_so_far(trials, metric, mode), where="post", color="#333333", linewidth=1.6, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(image, format="png", dpi=130)


def best_so_far(trials: Sequence[Trial], metric: str, mode: str) -> tuple[list[int], list[float]]:
    """Numbers of the trials that went to their end, and the best value up to each."""
    better = min if mode == "min" else max
    numbers: list[int] = []
    values: list[float] = []
    for trial in sorted(trials, key=lambda one: one.number):
        value = trial.last(metric)
        if trial.state == "finished" and value is not None:
            numbers.append(trial.number)
            values.append(value if not values else better(values[-1], value))
    return numbers, values


def trials_plot(trials: Sequence[Trial], metric: str, image: Path) -> None:
    """The metric over the steps of every trial."""
    figure, axes = _figure()
    colours = _colours(trials)
    named: set[str] = set()
    for trial in trials:
        points = [(report["step"], report[metric]) for report in trial.reports if report.get(metric) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        label = None if trial.branch_name in named else trial.branch_name
        named.add(trial.branch_name)
        colour = colours[trial.branch_name]
        axes.plot(steps, values, alpha=0.75, label=label, color=colour, linewidth=1.2, marker="o", markersize=2.5)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    if named:
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(image, format="png", dpi=130)
