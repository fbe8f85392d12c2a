"""What a search leaves in `output_dir`: the best model and its recipe, the best recipe of each method, all trials.

best.yaml            the best trial as a recipe that `tunefleet train` runs (of several metrics: front_1.yaml, ...)
best_of/lora.yaml    the same for the best trial of each branch, which may have been stopped where none went to its end
trials.parquet       a row for each trial
best_so_far.png      what was found, trial by trial
trials.png           every trial's curve, by branch
tournament.json      of a tournament: each method's mean and spread over the seeds, and which won
and the best trial's model and record.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.table import Table
from rich.text import Text

from tunefleet.errors import RunFailed
from tunefleet.recipe.tune import TuneSettings
from tunefleet.search.book import BOOK, Book, Trial, best, front
from tunefleet.search.live import COLOURS, sampled
from tunefleet.search.plots import best_so_far_plot, trials_plot
from tunefleet.search.result import keep_result
from tunefleet.search.tournament import Standing, as_json, best_of_branches, standings, winner
from tunefleet.search.trials import Workshop

_OF_A_SEARCH = ("overwrite_output_dir", "resume_from_checkpoint", "ray_run_name")
"""Keys that say something of the search and nothing of its trials."""


def leave(shop: Workshop, book: Book) -> None:
    """Put what a search leaves into its storage.

    Raises:
        RunFailed: no trial went to its end.
    """
    settings = shop.tune
    winners = winning(book, settings)
    if not winners:
        errors = [trial for trial in book.trials if trial.error is not None]
        why = f", the first of the errors is {errors[0].error}" if errors else ""
        raise RunFailed(f"None of the {len(book.trials)} trials went to its end{why}: see {book_uri(shop)}.")
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as name:
        files = Path(name)
        write_recipes(shop, book, winners, files)
        pq.write_table(trials_columns(book, settings), files / "trials.parquet")
        if settings.tournament:
            table = as_json(standings(book, settings), settings)
            (files / "tournament.json").write_text(json.dumps(table, indent=2) + "\n")
        best_so_far_plot(book.sampled, settings.metrics[0], settings.modes[0], files / "best_so_far.png")
        trials_plot(book.trials, settings.metrics[0], files / "trials.png")
        keep_result(shop.search, files, [trial.name for trial in winners])


def write_recipes(shop: Workshop, book: Book, winners: Sequence[Trial], folder: Path) -> None:
    """The recipe of the best trial, or of each of the front, and that of each branch's best."""
    alone = len(shop.tune.metrics) == 1
    for place, trial in enumerate(winners, 1):
        write_recipe(shop, trial, folder / ("best.yaml" if alone else f"front_{place}.yaml"))
    (folder / "best_of").mkdir()
    for trial in best_of_branches(book, shop.tune):
        name = re.sub(r"[^A-Za-z0-9]+", "_", trial.branch_name).strip("_")
        write_recipe(shop, trial, folder / "best_of" / f"{name}.yaml")


def book_uri(shop: Workshop) -> str:
    return shop.search.child(BOOK).uri


def winning(book: Book, settings: TuneSettings) -> list[Trial]:
    """The best trial; of several metrics the front; of a tournament the finalist of the method that won."""
    if settings.tournament:
        first = winner(standings(book, settings))
        if first is not None and first.finalist is not None:
            return [first.finalist]
    if len(settings.metrics) > 1:
        return front(book.trials, dict(zip(settings.metrics, settings.modes, strict=True)))
    found = best(book.sampled, settings.metrics[0], settings.modes[0])
    return [] if found is None else [found]


def write_recipe(shop: Workshop, trial: Trial, file: Path) -> None:
    """A trial as a recipe of its own: what the person wrote, what was sampled, and the workers that it ran on."""
    keys = {key: value for key, value in shop.keys(trial.point()).items() if value is not None}
    keys = {key: value for key, value in keys.items() if key not in _OF_A_SEARCH}
    keys["output_dir"] = f"{str(keys['output_dir']).rstrip('/')}-{file.stem}"
    plain = json.loads(json.dumps(keys, default=list))
    figures = ", ".join(f"{name} {trial.last(name)}" for name in shop.tune.metrics)
    figures += "" if trial.state == "finished" else f", {trial.state} after {trial.steps} of {trial.updates} steps"
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    file.write_text(f"# Trial {trial.number} of the search {shop.search.name} ({trial.branch_name}): {figures}\n{text}")


def trials_columns(book: Book, settings: TuneSettings) -> pa.Table:
    """All trials as columns: what they are, each sampled key, the last value of each metric, and all reports."""
    trials = book.trials
    columns: dict[str, pa.Array] = {
        "trial": pa.array([trial.number for trial in trials], pa.int64()),
        "run": pa.array([trial.name for trial in trials], pa.string()),
        "branch": pa.array([trial.branch_name for trial in trials], pa.string()),
        "method": pa.array([trial.method for trial in trials], pa.string()),
        "workers": pa.array([trial.workers for trial in trials], pa.int64()),
        "state": pa.array([trial.state for trial in trials], pa.string()),
        "steps": pa.array([trial.steps for trial in trials], pa.int64()),
        "updates": pa.array([trial.updates for trial in trials], pa.int64()),
        "seconds": pa.array([trial.seconds for trial in trials], pa.float64()),
        "error": pa.array([trial.error for trial in trials], pa.string()),
        "repeats": pa.array([trial.repeats for trial in trials], pa.int64()),
        "seed": pa.array([trial.seed for trial in trials], pa.int64()),
    }
    for metric in settings.metrics:
        columns[metric] = pa.array([trial.last(metric) for trial in trials], pa.float64())
    for key in dict.fromkeys(key for trial in trials for key in trial.values):
        columns[f"sampled.{key}"] = _column([trial.values.get(key) for trial in trials])
    columns["report_steps"] = pa.array(
        [[report["step"] for report in trial.reports] for trial in trials], pa.list_(pa.int64())
    )
    columns["report_values"] = pa.array(
        [[report.get(settings.metrics[0]) for report in trial.reports] for trial in trials], pa.list_(pa.float64())
    )
    return pa.table(columns)


def _column(values: Sequence[object]) -> pa.Array:
    """Values of one key as the narrowest type that holds them all."""
    there = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in there):
        return pa.array(values, pa.bool_())
    if all(isinstance(value, int) and not isinstance(value, bool) for value in there):
        return pa.array(values, pa.int64())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        return pa.array([None if value is None else float(str(value)) for value in values], pa.float64())
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())


def result_table(book: Book, settings: TuneSettings) -> Table:
    """Every trial: those that went to their end first, best first, with the best of all and of each branch marked."""
    metric, sign = settings.metrics[0], 1.0 if settings.modes[0] == "min" else -1.0
    winners = {trial.name for trial in winning(book, settings)}
    best_ones = {trial.name for trial in best_of_branches(book, settings)}
    table = Table("", "method", "sampled", "workers", "steps", *settings.metrics, "state", title="trials")
    table.title_justify = "left"

    def order(trial: Trial) -> tuple[bool, float]:
        value = trial.last(metric)
        return (trial.state != "finished", float("inf") if value is None else sign * value)

    for trial in sorted(book.trials, key=order):
        mark_of = "best" if trial.name in winners else "best of its branch" if trial.name in best_ones else ""
        figures = ["" if (value := trial.last(name)) is None else f"{value:.4f}" for name in settings.metrics]
        state = Text(trial.state if not mark_of else f"{trial.state}, {mark_of}", style=COLOURS[trial.state])
        if trial.error:
            state.append(f": {trial.error}")
        steps = f"{trial.steps}/{trial.updates or '?'}"
        row = (str(trial.number), Text(trial.branch_name), Text(sampled(trial)), str(trial.workers), steps)
        table.add_row(*row, *figures, state, style="bold" if trial.name in winners else None)
    return table


def tournament_table(ranked: Sequence[Standing], settings: TuneSettings) -> Table:
    """The methods, best mean first."""
    metric, first = settings.metrics[0], winner(ranked)
    title = "the tournament: " + (f"{first.branch_name} wins" if first is not None else "no repeat went to its end")
    columns = ("method", "trials", "steps", "finalist", f"mean {metric}", "standard deviation", "seeds")
    table = Table(*columns, title=title)
    table.title_justify = "left"
    for one in ranked:
        finalist = "none" if one.finalist is None else f"{one.finalist.number} ({sampled(one.finalist)})"
        mean, spread = ("" if value is None else f"{value:.4f}" for value in (one.mean, one.spread))
        row = (Text(one.branch_name), str(one.trials), str(one.steps), Text(finalist), mean, spread)
        table.add_row(*row, str(len(one.values)), style="bold" if one is first else None)
    return table
