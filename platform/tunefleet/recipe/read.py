"""A recipe file -> a `Recipe`, or everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from tunefleet.recipe import owners, peers, rules
from tunefleet.recipe.check import Checked, check
from tunefleet.recipe.problems import Problem, RecipeError, shown, split_sentence
from tunefleet.recipe.sections import Recipe
from tunefleet.recipe.yaml_text import read_mapping, read_overrides, read_text
from tunefleet_strategies import registry
from tunefleet_strategies.contract import Strategy
from tunefleet_strategies.errors import StrategyError


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, with `key=value` words laid over it. `key=null` clears a key.

    Raises:
        RecipeError: everything that is wrong with the file and the overrides.
    """
    over, override_problems = read_overrides(overrides)
    try:
        keys, problems = read_mapping(read_text(path), str(path))
    except RecipeError as error:
        raise RecipeError([*error.problems, *override_problems]) from None
    mended = [problem for problem in problems if problem.key not in over]
    return _read(keys | over, written=None, found=[*mended, *override_problems])


def read_flat(keys: Mapping[str, object], written: Iterable[str] | None = None) -> Recipe:
    """Read keys and values that are already in memory, such as those of `Recipe.flat`.

    Args:
        keys: Keys of a recipe; null stands for the default.
        written: The keys that a person wrote, where another recipe knows; else all that are not null.

    Raises:
        RecipeError: everything that is wrong with the keys.
    """
    return _read(keys, written=None if written is None else frozenset(written), found=[])


@dataclass
class _Sorted:
    """The keys of a recipe by owner."""

    sections: dict[str, dict[str, object]] = field(default_factory=lambda: {name: {} for name in owners.SECTIONS})
    method: dict[str, object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def _read(keys: Mapping[str, object], written: frozenset[str] | None, found: list[Problem]) -> Recipe:
    present = {key: value for key, value in keys.items() if value is not None}
    cleared = [key for key, value in keys.items() if value is None and not _is_known(key)]
    present, warmup = _warmup_as_ratio(present)
    method = _select(present, found)
    sort = _sort(present, method)
    sort.problems += [owners.unknown(key) for key in cleared]
    checked = {name: check(owner, sort.sections[name]) for name, owner in owners.SECTIONS.items()}
    tuned = check(method, sort.method) if method is not None else None
    typed: list[Checked[BaseModel]] = [*checked.values(), *([] if tuned is None else [tuned])]
    values = rules.Values(
        values={key: value for part in typed for key, value in part.values.items()},
        written=frozenset(present) if written is None else written,
    )
    found += sort.problems
    found += [problem for part in typed for problem in part.problems]
    if method is None:
        found += _values_of_any_method(sort.method)
    found += rules.problems(values)
    found += _homeless(present)
    if found:
        raise RecipeError(_in_order(found, keys))
    own = values.written & owners.known_keys()
    said = (*sort.notices, *warmup, *rules.notices(values), *_unused(None if tuned is None else tuned.model, own))
    parts: dict[str, object] = {name: part.model for name, part in checked.items()}
    return Recipe.model_validate({**parts, "method": tuned and tuned.model, "written": own, "notices": said})


def _is_known(key: str) -> bool:
    return key in owners.known_keys() or key in peers.IGNORED or key in peers.REFUSED


def _warmup_as_ratio(keys: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """transformers 5 takes `warmup_steps: 0.1` for a part of all steps."""
    steps = keys.get("warmup_steps")
    if not isinstance(steps, float) or not 0 < steps < 1 or "warmup_ratio" in keys:
        return dict(keys), []
    renamed = {("warmup_ratio" if key == "warmup_steps" else key): value for key, value in keys.items()}
    return renamed, [f"warmup_steps: {shown(steps)} is below 1 and read as warmup_ratio: {shown(steps)}"]


def _select(keys: Mapping[str, object], found: list[Problem]) -> type[Strategy] | None:
    try:
        return registry.select(keys)
    except StrategyError as error:
        sentence = str(error)
        named = {key: sentence.find(key) for key in registry.selector_keys() if key in sentence}
        found.append(split_sentence(min(named, key=lambda key: named[key], default="finetuning_type"), sentence))
        return None


def _sort(keys: Mapping[str, object], method: type[Strategy] | None) -> _Sorted:
    """Give every key to its owner; say what is wrong with those that have none here."""
    sort = _Sorted()
    selectors = registry.selector_keys()
    for key, value in keys.items():
        section = owners.section_of(key)
        methods = registry.owners(key)
        if section is not None:
            sort.sections[section][key] = value
        elif key in selectors:
            continue
        elif methods and (method is None or method.name in methods):
            sort.method[key] = value
        elif methods and method is not None:
            sort.problems.append(owners.foreign(key, methods, method))
        else:
            _sort_peer(key, value, sort)
    return sort


def _sort_peer(key: str, value: object, sort: _Sorted) -> None:
    verdict = peers.judge(key, value)
    if isinstance(verdict, str):
        sort.notices.append(verdict)
    else:
        sort.problems.append(verdict or owners.unknown(key))


def _values_of_any_method(keys: Mapping[str, object]) -> list[Problem]:
    """Where no method could be selected, its keys are still checked one by one."""
    problems: list[Problem] = []
    for method in registry.methods():
        mine = {key: value for key, value in keys.items() if registry.owners(key)[0] == method.name}
        problems += [problem for problem in check(method, mine).problems if problem.key in mine]
    return problems


def _unused(method: Strategy | None, written: Iterable[str]) -> list[str]:
    """Keys of the method that a person wrote and that do nothing beside its others."""
    idle = {} if method is None else method.unused()
    return [f"{key}: not used, because {reason}" for key, reason in idle.items() if key in written]


def _homeless(keys: Mapping[str, object]) -> list[Problem]:
    """Paths below the home of a user whom this machine does not know, which nothing could open."""
    problems: list[Problem] = []
    for key, value in keys.items():
        if not (isinstance(value, str) and value.startswith("~")):
            continue
        try:
            Path(value).expanduser()
        except RuntimeError:
            what = f"{value} begins with a user whom this machine does not know"
            problems.append(Problem(key, what, "write the whole path, or ~/ for your own home"))
    return problems


def _in_order(found: list[Problem], keys: Mapping[str, object]) -> list[Problem]:
    """Problems in the order of the file; first those of no key, last those of keys that are not written."""
    places = {key: place for place, key in enumerate(keys)}
    rest = {problem.key: len(places) for problem in found if problem.what == "is missing"}
    return sorted(dict.fromkeys(found), key=lambda problem: places.get(problem.key, rest.get(problem.key, -1)))
