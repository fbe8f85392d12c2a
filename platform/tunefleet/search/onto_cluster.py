"""From a recipe file, of a run or of a search, to what it asks of a cluster on Kubernetes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunefleet.launch.demand import Demand, train_demand
from tunefleet.launch.off_this_machine import STORAGE, Storage, refuse_local, refuse_users_in_urls, storage_of
from tunefleet.recipe.problems import RecipeError
from tunefleet.recipe.tune import KEY
from tunefleet.recipe.yaml_text import read_mapping, read_overrides, read_text
from tunefleet.search.demand import search_demand


def demand_of(
    path: Path, overrides: Sequence[str], storage: str | None, workers_per_pod: int | None
) -> tuple[Demand, Storage]:
    """What a recipe asks for, and where it is kept.

    Args:
        overrides: `key=value` words laid over the file; those of a search are written `tune.num_samples=8`.
        storage: what `--storage` says; it wins over the recipe.

    Raises:
        Refused: the recipe cannot run on a cluster.
    """
    keys = _merged(path, overrides)
    place = storage_of(storage, keys.get(STORAGE))
    refuse_users_in_urls({**keys, STORAGE: None}, "--secret NAME=SECRET:KEY")
    refuse_local(keys, place)
    keys[STORAGE] = place.uri
    make = search_demand if keys.get(KEY) is not None else train_demand
    return make(keys, Path.cwd(), workers_per_pod), place


def _merged(path: Path, overrides: Sequence[str]) -> dict[str, object]:
    over, wrong = read_overrides(overrides)
    keys, problems = read_mapping(read_text(path), str(path))
    found = [*(problem for problem in problems if problem.key not in over), *wrong]
    if found:
        raise RecipeError(found)
    block = keys.get(KEY)
    laid = {key.removeprefix(f"{KEY}."): value for key, value in over.items() if key.startswith(f"{KEY}.")}
    if laid and isinstance(block, dict):
        keys[KEY] = {**block, **laid}
    return {**keys, **{key: value for key, value in over.items() if not key.startswith(f"{KEY}.")}}
