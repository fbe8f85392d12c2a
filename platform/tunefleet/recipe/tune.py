"""The `tune:` block of a recipe: what a search looks for and how. What a space means is decided in `search/`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, WithJsonSchema

from tunefleet.recipe.check import check
from tunefleet.recipe.problems import Problem, RecipeError, shown
from tunefleet.recipe.yaml_text import read_mapping, read_overrides, read_text
from tunefleet.settings import Settings

KEY = "tune"
Mode = Literal["min", "max"]

LATER: Mapping[str, str] = {
    "memory_limit": "there is no estimate of a trial's memory yet; remove it",
}
"""Keys that a search will have, each with the sentence that refuses it until then."""


def _read_words(value: object) -> object:
    """One word, or a list of them."""
    if isinstance(value, list | tuple) and not value:
        raise ValueError("is an empty list; write one name, or several")
    return tuple(value) if isinstance(value, list) else value


def _read_budget(value: object) -> object:
    if not isinstance(value, Mapping) or set(value) != {"hours"}:
        raise ValueError(f"{shown(value)} is no number of hours; write {{hours: 2}}")
    hours = value["hours"]
    if isinstance(hours, bool) or not isinstance(hours, int | float) or not 0 < hours < math.inf:
        raise ValueError("takes a number of hours above 0; write {hours: 2}")
    return {"hours": float(hours)}


def _read_concurrency(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{shown(value)} is neither auto nor a number of trials; write auto or 4")


_WORDS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
_MODES = {
    "anyOf": [
        {"type": "string", "enum": ["min", "max"]},
        {"type": "array", "items": {"type": "string", "enum": ["min", "max"]}, "minItems": 1},
    ]
}
_BUDGET = {
    "type": "object",
    "properties": {"hours": {"type": "number", "exclusiveMinimum": 0}},
    "required": ["hours"],
    "additionalProperties": False,
}
_CONCURRENCY = {"anyOf": [{"type": "string", "const": "auto"}, {"type": "integer", "minimum": 1}]}
_SPACE = {
    "anyOf": [
        {"type": "string", "const": "auto"},
        {"type": "object"},
        {"type": "array", "items": {"type": "object"}, "minItems": 1},
    ]
}


class TuneSettings(Settings):
    """What a search looks for, where, and how long."""

    metric: Annotated[str | tuple[str, ...], BeforeValidator(_read_words), WithJsonSchema(_WORDS)] = Field(
        "eval_loss", description="A reported metric; a list of them asks for the front instead of one best trial."
    )
    mode: Annotated[Mode | tuple[Mode, ...], BeforeValidator(_read_words), WithJsonSchema(_MODES)] = Field(
        "min", description="Whether less of the metric is better, or more; one for all metrics, or a list."
    )
    num_samples: int | None = Field(
        None, ge=1, description="Trials, equal ones counted once; unset: 10. A grid runs all of its points."
    )
    search: Literal["grid", "random", "optuna", "hyperopt", "bohb"] = Field(
        "optuna", description="How points are chosen; `bohb` for one branch, with `scheduler: hyperband`."
    )
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = Field(
        "none",
        description="Which trials are stopped before their end; pbt stops none, but lets the worst of a branch go on "
        "from the best with changed values.",
    )
    grace_steps: int | None = Field(
        None, ge=1, description="Steps that every trial gets under asha and median; unset: until the first evaluation."
    )
    reduction_factor: int = Field(3, ge=2, description="asha and hyperband keep one trial in so many at each rung.")
    perturbation_interval: int | None = Field(
        None,
        ge=1,
        description="pbt: steps from one comparison of a population to the next, whole evaluations; unset: about a "
        "quarter of a trial.",
    )
    quantile_fraction: float = Field(
        0.25, gt=0, le=0.5, description="pbt: so many of the worst take over the state of as many of the best."
    )
    max_concurrent_trials: Annotated[
        int | Literal["auto"], BeforeValidator(_read_concurrency), WithJsonSchema(_CONCURRENCY)
    ] = Field("auto", description="Trials at once, a number; auto: as many as the machines hold, whatever their sizes.")
    budget: Annotated[dict[str, float], BeforeValidator(_read_budget), WithJsonSchema(_BUDGET)] | None = Field(
        None, description="{hours: 2}: after so long, over all calls of the command, no trial goes on."
    )
    tournament: bool = Field(
        False,
        description="As many trials for each branch, judged only by their own kind; then the best of each again, under "
        "other seeds.",
    )
    finalist_seeds: int = Field(3, ge=1, description="Under how many other seeds a tournament repeats its finalists.")
    trial_retries: int = Field(1, ge=0, description="How often a trial that fails is begun again, from its checkpoint.")
    trial_host: Literal["cold", "warm"] = Field(
        "cold",
        description="`cold`: each trial starts workers of its own. `warm`: trials of one worker without sharding are "
        "forks of a process that has imported everything and holds the base model; other trials stay cold.",
    )
    search_seed: int | None = Field(None, ge=0, lt=2**32, description="Seeds the choice of points; unset: `seed`.")
    space: Annotated[JsonValue, WithJsonSchema(_SPACE)] = Field(
        description="One branch (a mapping), several (a list of mappings), or auto: each method's own."
    )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics as a list."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The mode of each metric."""
        return (self.mode,) * len(self.metrics) if isinstance(self.mode, str) else self.mode

    @property
    def shares(self) -> bool:
        """Whether each branch has its own part of the trials, which no other takes from it."""
        return self.tournament or self.scheduler == "pbt"

    @property
    def seconds(self) -> float | None:
        """The budget; None = no end."""
        return None if self.budget is None else self.budget["hours"] * 3600


@dataclass(frozen=True)
class SearchRecipe:
    """A recipe with a `tune:` block: the keys that all trials share, and the block."""

    keys: Mapping[str, object]
    """Every key beside `tune`, as written; null stands for the default."""
    tune: TuneSettings


def read_search(path: Path, overrides: Sequence[str] = ()) -> SearchRecipe:
    """Read a recipe file with a `tune:` block. Overrides of the block are written `tune.num_samples=8`.

    Raises:
        RecipeError: everything that is wrong with the block; the other keys are read with each branch.
    """
    over, override_problems = read_overrides(overrides)
    keys, problems = read_mapping(read_text(path), str(path))
    found = [*(problem for problem in problems if problem.key not in over), *override_problems]
    return search_from(keys | {key: value for key, value in over.items() if not _of_block(key)}, over, found)


def search_from(
    keys: Mapping[str, object], over: Mapping[str, object] | None = None, found: Iterable[Problem] = ()
) -> SearchRecipe:
    """A search from keys that are already in memory.

    Raises:
        RecipeError: as `read_search`.
    """
    problems = list(found)
    block = keys.get(KEY)
    if block is None:
        problems.append(Problem(KEY, "is missing", "write tune: with a space, or give the recipe to `tunefleet train`"))
        raise RecipeError(problems)
    if not isinstance(block, Mapping):
        problems.append(Problem(KEY, f"{shown(block)} is no mapping", "write tune: and its keys below, indented"))
        raise RecipeError(problems)
    laid = {key.removeprefix(f"{KEY}."): value for key, value in (over or {}).items() if _of_block(key)}
    wanted = {str(key): value for key, value in {**block, **laid}.items() if value is not None}
    known = {key: value for key, value in wanted.items() if key in TuneSettings.model_fields}
    problems += [_unknown(key) for key in wanted if key not in known]
    checked = check(TuneSettings, known)
    problems += [replace(problem, key=f"{KEY}.{problem.key}") for problem in checked.problems]
    if checked.model is not None:
        problems += _between(checked.model)
    if problems or checked.model is None:
        raise RecipeError(problems)
    return SearchRecipe({key: value for key, value in keys.items() if key != KEY}, checked.model)


def _of_block(key: str) -> bool:
    return key.startswith(f"{KEY}.")


def _unknown(key: str) -> Problem:
    place = f"{KEY}.{key}"
    if key in LATER:
        what, _, mend = LATER[key].partition("; ")
        return Problem(place, what, mend)
    near = difflib.get_close_matches(key, TuneSettings.model_fields, n=1, cutoff=0.6)
    mend = f"did you mean {KEY}.{near[0]}?" if near else "keys of trials stand above tune, or in tune.space"
    return Problem(place, "is no key of a search", mend)


def _between(tune: TuneSettings) -> list[Problem]:
    """Rules between the keys of the block."""
    problems: list[Problem] = []
    several = len(tune.metrics) > 1
    if len(tune.modes) != len(tune.metrics):
        what = f"has {len(tune.modes)} directions for {len(tune.metrics)} metrics"
        problems.append(Problem("tune.mode", what, "write one of min and max for each metric"))
    if len(set(tune.metrics)) < len(tune.metrics):
        problems.append(Problem("tune.metric", "names a metric twice", "write each once"))
    if several and tune.search in ("hyperopt", "bohb"):
        what = f"{tune.search} follows one metric, and tune.metric has {len(tune.metrics)}"
        problems.append(Problem("tune.search", what, "write search: optuna"))
    if several and tune.scheduler != "none":
        what = f"{tune.scheduler} compares trials by one metric, and tune.metric has {len(tune.metrics)}"
        problems.append(Problem("tune.scheduler", what, "write scheduler: none"))
    if tune.search == "bohb" and tune.scheduler != "hyperband":
        what = f"bohb learns at the rungs of hyperband, and tune.scheduler is {tune.scheduler}"
        problems.append(Problem("tune.search", what, "write scheduler: hyperband"))
    if tune.search == "grid" and tune.num_samples is not None:
        what = "a grid runs all of its points, whatever their number"
        problems.append(Problem("tune.num_samples", what, "remove it, or write search: random"))
    if tune.grace_steps is not None and tune.scheduler not in ("asha", "median"):
        what = f"is for asha and median, and tune.scheduler is {tune.scheduler}"
        problems.append(Problem("tune.grace_steps", what, "remove it"))
    return problems + _of_tournament(tune) + _of_population(tune)


def _of_population(tune: TuneSettings) -> list[Problem]:
    """Keys of population based training."""
    if tune.scheduler == "pbt":
        if tune.trial_host == "cold":
            return []
        what = "keeps a host for whole trials, and under pbt each leaves its workers at every comparison"
        return [Problem("tune.trial_host", what, "write trial_host: cold, or scheduler: asha")]
    own = ("perturbation_interval", "quantile_fraction")
    return [
        Problem(f"tune.{key}", f"is for pbt, and tune.scheduler is {tune.scheduler}", "remove it")
        for key in own
        if key in tune.model_fields_set
    ]


def _of_tournament(tune: TuneSettings) -> list[Problem]:
    """What a tournament asks of the other keys."""
    if not tune.tournament:
        if "finalist_seeds" in tune.model_fields_set:
            return [Problem("tune.finalist_seeds", "is for tournament: true", "write that, or remove it")]
        return []
    problems: list[Problem] = []
    if len(tune.metrics) > 1:
        what = f"compares methods by one metric, and tune.metric has {len(tune.metrics)}"
        problems.append(Problem("tune.tournament", what, "write one metric, or remove it"))
    if tune.search == "grid":
        what = "gives each method as many trials, and a grid runs all points of each"
        problems.append(Problem("tune.tournament", what, "write search: random"))
    if tune.scheduler == "pbt":
        what = "repeats a recipe under other seeds, and under pbt values change on the way"
        problems.append(Problem("tune.tournament", what, "remove it: pbt keeps a population of each method anyway"))
    if tune.scheduler == "hyperband":
        what = "judges trials within their method, and hyperband mixes all into brackets of its own"
        problems.append(Problem("tune.tournament", what, "write scheduler: asha"))
    return problems
