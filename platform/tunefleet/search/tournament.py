"""A tournament: each method has as many trials and is judged by its own kind; then the best of each runs again.

The best of many trials is partly luck with a seed. So a finalist is repeated under seeds that had no part in choosing
it, the same ones for every method, and methods are compared by the mean of these repeats. A seed decides what is drawn:
start values, dropout, the order of the data. Held-out rows that are drawn (`val_size`) stay those of the search.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunefleet.recipe.sections import Recipe
from tunefleet.recipe.tune import TuneSettings
from tunefleet.search.book import Book, Trial, best
from tunefleet.search.space import Point, Space

DEFAULT_SAMPLES = 10
"""Trials of a search that does not say how many; where branches share them, the next number that they can."""


@dataclass(frozen=True)
class Standing:
    """How a method did."""

    branch_name: str
    trials: int
    """Of its bracket."""
    steps: int
    """Updates that they took together."""
    finalist: Trial | None
    """The best of the bracket; None where none went to its end."""
    values: tuple[float, ...]
    """The metric of each repeat that went to its end, by seed."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, that of a sample; None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def samples(settings: TuneSettings, branches: int) -> int | None:
    """How many points a search samples; None = all that there are."""
    if settings.search == "grid":
        return None
    if settings.num_samples is not None:
        return settings.num_samples
    return math.ceil(DEFAULT_SAMPLES / branches) * branches if settings.shares else DEFAULT_SAMPLES


def planned_trials(space: Space, settings: TuneSettings) -> int:
    """How many trials there will be at most, repeats under other seeds included."""
    most = samples(settings, len(space.branches))
    sampled = sum(1 for _ in space.points()) if most is None else most
    return sampled + (len(space.branches) * settings.finalist_seeds if settings.tournament else 0)


def finalists(book: Book, settings: TuneSettings) -> list[Trial]:
    """The best trial of each branch, by the first metric, in the order of the branches' first trials."""
    found = (best(_bracket(book, name), settings.metrics[0], settings.modes[0]) for name in _names(book))
    return [trial for trial in found if trial is not None]


def best_of_branches(book: Book, settings: TuneSettings) -> list[Trial]:
    """The best trial of each branch, as `finalists`; where a scheduler let none go to its end, of those furthest on.

    A method that was pruned altogether is answered as well: with which values it was best, and after how many steps.
    """
    whole = {trial.branch_name: trial for trial in finalists(book, settings)}
    found = (whole.get(name) or _furthest(_bracket(book, name), settings) for name in _names(book))
    return [trial for trial in found if trial is not None]


def _furthest(trials: Sequence[Trial], settings: TuneSettings) -> Trial | None:
    """The best of the stopped trials that took the most steps."""
    metric, sign = settings.metrics[0], 1.0 if settings.modes[0] == "min" else -1.0
    cut = [trial for trial in trials if trial.state in ("stopped", "cut") and trial.last(metric) is not None]
    return min(cut, key=lambda trial: (-trial.steps, sign * float(trial.last(metric) or 0.0)), default=None)


def repeats_due(book: Book, settings: TuneSettings, seed: int) -> list[tuple[Trial, Point]]:
    """The repeats that have not begun, each with its finalist: the same seed of all methods before the next one.

    Args:
        seed: that of the search's own trials; repeats have those that follow it.
    """
    if not settings.tournament or any(not trial.ended for trial in book.sampled):
        return []
    chosen = finalists(book, settings)
    return [
        (trial, point)
        for turn in range(1, settings.finalist_seeds + 1)
        for trial in chosen
        if book.twin(point := _again(trial, (seed + turn) % 2**32)) is None
    ]


def reseeded(seed: int, recipe: Recipe) -> dict[str, object]:
    """What a repeat's recipe has otherwise than its finalist's."""
    held_out = {"data_seed": recipe.training.order_seed} if recipe.data.val_size > 0 else {}
    return {"seed": seed, **held_out}


def standings(book: Book, settings: TuneSettings) -> list[Standing]:
    """Every method, best mean first; those without a repeat that went to its end come last."""
    metric, sign = settings.metrics[0], 1.0 if settings.modes[0] == "min" else -1.0
    final = {trial.branch_name: trial for trial in finalists(book, settings)}
    found = []
    for name in _names(book):
        bracket, finalist = _bracket(book, name), final.get(name)
        again = [trial for trial in book.trials if finalist is not None and trial.repeats == finalist.number]
        values = (trial.last(metric) for trial in again if trial.state == "finished")
        steps = sum(trial.steps for trial in bracket)
        found.append(
            Standing(name, len(bracket), steps, finalist, tuple(value for value in values if value is not None))
        )
    return sorted(found, key=lambda one: math.inf if one.mean is None else sign * one.mean)


def winner(ranked: Sequence[Standing]) -> Standing | None:
    """The method with the best mean; None where no repeat of any went to its end."""
    return ranked[0] if ranked and ranked[0].mean is not None else None


def as_json(ranked: Sequence[Standing], settings: TuneSettings) -> Mapping[str, object]:
    """Standings as `tournament.json` has them."""
    first = winner(ranked)
    return {
        "metric": settings.metrics[0],
        "mode": settings.modes[0],
        "winner": None if first is None else first.branch_name,
        "methods": [
            {
                "method": one.branch_name,
                "trials": one.trials,
                "steps": one.steps,
                "finalist": None if one.finalist is None else one.finalist.number,
                "values": list(one.values),
                "mean": one.mean,
                "standard_deviation": one.spread,
            }
            for one in ranked
        ],
    }


def _names(book: Book) -> list[str]:
    return list(dict.fromkeys(trial.branch_name for trial in book.sampled))


def _bracket(book: Book, name: str) -> list[Trial]:
    return [trial for trial in book.sampled if trial.branch_name == name]


def _again(finalist: Trial, seed: int) -> Point:
    return Point(finalist.branch, finalist.values, f"{finalist.digest}_seed{seed}", seed)
