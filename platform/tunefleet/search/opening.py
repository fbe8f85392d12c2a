"""From a `tune:` block to a `Space`, or everything that is wrong with it, before a first trial starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tunefleet.recipe import owners
from tunefleet.recipe.check import check, json_types, properties
from tunefleet.recipe.problems import Problem, RecipeError, shown, split_sentence
from tunefleet.recipe.sections import Recipe
from tunefleet.recipe.tune import SearchRecipe, TuneSettings
from tunefleet.search.domains import ends, is_domain, read_domain, values
from tunefleet.search.space import MOST_TRIED, PLACEMENT, WISH, Branch, Space, in_order
from tunefleet_strategies import registry
from tunefleet_strategies.carry import mutable_keys
from tunefleet_strategies.contract import Domain, LogUniform, QUniform, Strategy, Uniform
from tunefleet_strategies.errors import StrategyError

METRICS = ("eval_loss", "loss", "grad_norm", "tokens_per_second", "mfu", "seconds")
"""What a search may look for: the figures that every run reports."""
MOST_POINTS = 100_000
SAME_FOR_ALL = frozenset(
    {
        *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
        *("seed", "data_seed", "do_train", "do_eval", "per_device_eval_batch_size"),
    }
)
"""Keys of training that make trials comparable: the same global batches in the same order, the same evaluation."""
MAPPINGS = frozenset({"resources_per_worker", "deepspeed"})
"""Keys whose own value is a mapping."""


@dataclass(frozen=True)
class _Written:
    """One branch as it was written."""

    index: int
    place: str
    keys: Mapping[str, object]


def open_space(search: SearchRecipe) -> Space:
    """Check the whole space of a search and order it.

    Raises:
        RecipeError: everything that is wrong, each with the rule that it breaks.
    """
    notices: list[str] = []
    written = _branches(search, notices)
    found: list[Problem] = []
    opened = [_open(one, search, found) for one in written]
    branches = [branch for branch in opened if branch is not None]
    if len(branches) == len(written):
        found += _nobodys(search.keys, branches)
    found += _search_rules(search.tune, written, branches)
    if not found:
        for one, branch in zip(written, branches, strict=True):
            found += _runs(one, branch, search.tune)
    if found:
        raise RecipeError(dict.fromkeys(found))
    return Space(tuple(_named(branches)), tuple(notices))


def _branches(search: SearchRecipe, notices: list[str]) -> list[_Written]:
    space = search.tune.space
    if space == "auto":
        return _automatic(search.keys, notices)
    if isinstance(space, Mapping):
        listed: Sequence[object] = [space]
    elif isinstance(space, list) and space:
        listed = space
    else:
        raise RecipeError(
            [Problem("tune.space", f"{shown(space)} is no space", "write a list of branches, one mapping, or auto")]
        )
    branches: list[_Written] = []
    for index, keys in enumerate(listed):
        place = "tune.space" if space is keys else f"tune.space[{index}]"
        if not isinstance(keys, Mapping) or not keys:
            what = f"{shown(keys)} is no branch"
            raise RecipeError([Problem(place, what, "write a mapping of keys to values and domains")])
        branches.append(_Written(index, place, {str(key): value for key, value in keys.items()}))
    return branches


def _automatic(shared: Mapping[str, object], notices: list[str]) -> list[_Written]:
    """The own space of the method that the recipe selects, or of every method if it selects none."""
    selectors = {key: shared[key] for key in sorted(registry.selector_keys()) if shared.get(key) is not None}
    branches: list[_Written] = []
    try:
        chosen = [registry.select(selectors)] if selectors else list(registry.methods())
        for index, method in enumerate(chosen):
            own = {key: value for key, value in shared.items() if key in method.model_fields and value is not None}
            read = check(method, own)
            if read.model is None:
                raise RecipeError(read.problems)
            space = read.model.search_space()
            overruled = sorted(key for key in space if shared.get(key) is not None)
            notices += [f"{key}: not used for {method.name}, because space: auto searches it" for key in overruled]
            branches.append(_Written(index, f"tune.space: auto ({method.name})", {**method.selector, **space}))
    except StrategyError as error:
        raise RecipeError([split_sentence("tune.space", f"auto: {error}")]) from error
    return branches


def _open(one: _Written, search: SearchRecipe, found: list[Problem]) -> Branch | None:
    """A branch, if each of its keys is right by itself."""
    before = len(found)
    fixed, searched = _sorted(one, found)
    selectors = registry.selector_keys()
    chooses = any(key in selectors for key in fixed)
    base = {key: value for key, value in search.keys.items() if not (chooses and key in selectors)}
    try:
        method = registry.select({**base, **fixed})
    except StrategyError as error:
        found.append(_at(one, split_sentence("finetuning_type", str(error))))
        return None
    for key in (*fixed, *searched):
        if registry.owners(key) and key not in method.model_fields:
            found.append(_at(one, owners.foreign(key, registry.owners(key), method)))
    own = {key: (value,) for key, value in fixed.items()} | {key: ends(domain) for key, domain in searched.items()}
    for key, ones in own.items():
        found += [_at(one, problem) for problem in _wrong_alone(key, ones, method)]
    found += [_at(one, problem) for problem in _fractions_of_whole(searched, method)]
    if len(found) > before:
        return None
    shared = {
        key: value
        for key, value in base.items()
        if key not in searched and (not registry.owners(key) or key in method.model_fields or key in selectors)
    }
    order = in_order(method, {**shared, **fixed}, searched)
    return Branch(one.index, method.name, method, shared, fixed, order)


def _sorted(one: _Written, found: list[Problem]) -> tuple[dict[str, object], dict[str, Domain]]:
    """The fixed keys and the domains of a branch."""
    fixed: dict[str, object] = {}
    searched: dict[str, Domain] = {}
    for key, value in one.keys.items():
        refusal = _no_key_of_a_space(key, value)
        if refusal is not None:
            found.append(_at(one, refusal))
        elif not isinstance(value, Domain) and not _meant_as_domain(key, value):
            fixed[key] = value
        else:
            try:
                searched[key] = value if isinstance(value, Domain) else _domain(value)
            except ValueError as error:
                found.append(_at(one, split_sentence(key, str(error))))
    return fixed, searched


def _meant_as_domain(key: str, value: object) -> bool:
    return isinstance(value, Mapping) and (key not in MAPPINGS or (is_domain(value) and "choice" in value))


def _domain(value: object) -> Domain:
    if not isinstance(value, Mapping) or not is_domain(value):
        raise ValueError(f"{shown(value)} is no domain; write one word and its list, such as {{choice: [4, 8, 16]}}")
    return read_domain(value)


def _no_key_of_a_space(key: str, value: object) -> Problem | None:
    """Why a key cannot stand in a branch."""
    section = owners.section_of(key)
    if section is None and not registry.owners(key) and key not in registry.selector_keys():
        return owners.unknown(key)
    if key in registry.selector_keys() and not isinstance(value, str | bool):
        return Problem(key, "chooses the method, which is what branches are for", "write one branch for each method")
    outside = section in ("model", "data", "run") or (section == "ray" and key not in PLACEMENT)
    if outside or key in SAME_FOR_ALL:
        return Problem(key, "is the same for every trial, so that they can be compared", "write it above tune")
    if value is None:
        return Problem(key, "has no value", "remove it from the branch for its default")
    return None


def _wrong_alone(key: str, ones: Sequence[object], method: type[Strategy]) -> Iterator[Problem]:
    """What is wrong with single values of a key, whatever the others are."""
    if key in registry.selector_keys():
        return
    section = owners.section_of(key)
    owner = owners.SECTIONS[section] if section is not None else method
    if key not in owner.model_fields:
        return
    if isinstance(ones, tuple) and len(ones) == 1 and isinstance(ones[0], list) and not _takes_list(key, method):
        yield Problem(key, f"{shown(ones[0])} is no domain", f"write {{choice: {ones[0]}}}")
        return
    for value in ones:
        plain = list(value) if isinstance(value, tuple) else value
        yield from (
            problem
            for problem in check(owner, {key: plain}).problems
            if problem.key == key and problem.what != "is missing"
        )


def _fractions_of_whole(searched: Mapping[str, Domain], method: type[Strategy]) -> Iterator[Problem]:
    """Ranges of all numbers for keys that take whole ones."""
    for key, domain in searched.items():
        if isinstance(domain, Uniform | LogUniform | QUniform) and _types(key, method) == ("integer",):
            yield Problem(
                key, "takes whole numbers, and its domain has fractions", "write {randint: [4, 64]} or a choice"
            )


def _types(key: str, method: type[Strategy]) -> tuple[str, ...]:
    section = owners.section_of(key)
    owner = owners.SECTIONS[section] if section is not None else method
    return json_types(properties(owner)[key])


def _takes_list(key: str, method: type[Strategy]) -> bool:
    return "array" in _types(key, method)


def _at(one: _Written, problem: Problem) -> Problem:
    """A problem of a key inside a branch."""
    return Problem(f"{one.place}.{problem.key}", problem.what.removeprefix(f"{problem.key}: "), problem.mend)


def _nobodys(shared: Mapping[str, object], branches: Sequence[Branch]) -> Iterator[Problem]:
    """Keys above `tune` that belong to a method which no branch has."""
    for key, value in shared.items():
        methods = registry.owners(key)
        if value is None or not methods or key in registry.selector_keys():
            continue
        if not any(key in branch.method.model_fields for branch in branches):
            what = f"belongs to {' and '.join(methods)}, and no branch of tune.space selects that"
            yield Problem(key, what, f"remove {key}, or add a branch")


def _search_rules(tune: TuneSettings, written: Sequence[_Written], branches: Sequence[Branch]) -> Iterator[Problem]:
    """What the way of searching asks of the space."""
    if tune.search == "bohb" and len(written) > 1:
        what = f"bohb knows no branches, and tune.space has {len(written)}"
        yield Problem("tune.search", what, "write search: optuna, or keep one branch")
    yield from _bracket_rules(tune, len(written))
    for name in tune.metrics:
        if name not in METRICS:
            what = f"{shown(name)} is no figure that runs report"
            yield Problem("tune.metric", what, f"write one of {', '.join(METRICS)}")
    for branch in branches:
        place = written[branch.index].place
        if tune.search != "grid":
            continue
        if branch.continuous is not None:
            what = "has no end of values, so no grid goes through them"
            yield Problem(f"{place}.{branch.continuous}", what, "write {choice: [...]}, or search: random")
        elif math.prod(len(values(domain) or ()) for domain in branch.domains.values()) > MOST_POINTS:
            yield Problem(place, f"has more than {MOST_POINTS:,} points, too many for a grid", "write search: random")


def _bracket_rules(tune: TuneSettings, branches: int) -> Iterator[Problem]:
    """What is asked of branches that share the trials."""
    if not tune.shares:
        return
    least = 2 if tune.scheduler == "pbt" else 1
    of_what = "a population" if tune.scheduler == "pbt" else "a tournament"
    if tune.tournament and branches == 1:
        yield Problem(
            "tune.tournament",
            "compares methods, and tune.space has one branch",
            "add a branch, or write tournament: false",
        )
    elif tune.num_samples is not None and tune.num_samples < least * branches:
        what = f"{tune.num_samples} is too few for {of_what}, which has at least {least} of each branch"
        yield Problem("tune.num_samples", what, f"write {least * branches}")
    elif tune.num_samples is not None and tune.num_samples % branches:
        what = f"{tune.num_samples} cannot be shared evenly by the {branches} branches of {of_what}"
        yield Problem("tune.num_samples", what, f"write {math.ceil(tune.num_samples / branches) * branches}")


def _runs(one: _Written, branch: Branch, tune: TuneSettings) -> Iterator[Problem]:
    """Whether some point of a branch can run, and whether what is searched can be told apart."""
    first: RecipeError | None = None
    runs: Recipe | None = None
    for chosen in itertools.islice(branch.outlines(), MOST_TRIED):
        try:
            recipe = branch.recipe(chosen)
        except RecipeError as error:
            first = first or error
            continue
        runs = runs or recipe
        try:
            recipe.method.refuse_search(frozenset(chosen) & frozenset(branch.domains))
        except StrategyError as error:
            yield Problem(one.place, *_parts(str(error)))
            return
    if runs is not None:
        yield from _evaluation_rules(tune, runs)
        yield from _population_rules(one, branch, tune, runs)
        return
    assert first is not None
    for problem in first.problems:
        if problem.key in branch.fixed or problem.key in branch.domains or problem.key == WISH:
            yield Problem(one.place, f"can never run: {problem.line()}")
        else:
            yield problem


def _population_rules(one: _Written, branch: Branch, tune: TuneSettings, recipe: Recipe) -> Iterator[Problem]:
    """What population based training asks of a branch."""
    if tune.scheduler != "pbt":
        return
    may_change = mutable_keys(recipe.method)
    if not may_change & set(branch.domains):
        what = "searches nothing that pbt may change on the way"
        yield Problem(one.place, what, f"search one of {', '.join(sorted(may_change))}, or write scheduler: asha")
    if recipe.run.load_best_model_at_end:
        what = "takes an earlier checkpoint at the end, and a population hands on its newest ones"
        yield Problem("load_best_model_at_end", what, "remove it, or write scheduler: asha")


def _parts(sentence: str) -> tuple[str, str]:
    what, _, mend = sentence.partition("; ")
    return what, mend


def _evaluation_rules(tune: TuneSettings, recipe: Recipe) -> Iterator[Problem]:
    """What metric and scheduler ask of the recipe's evaluations."""
    evaluated = [name for name in tune.metrics if name.startswith("eval_")]
    if evaluated and recipe.run.eval_strategy == "no" and not recipe.training.do_eval:
        what = f"{evaluated[0]} is what the search looks for, and nothing evaluates at the end of a trial"
        yield Problem("tune.metric", what, "write eval_strategy: steps, and eval_dataset or val_size")
    elif evaluated and tune.scheduler != "none" and recipe.run.eval_strategy == "no":
        what = f"{tune.scheduler} stops trials between evaluations, and eval_strategy is no"
        yield Problem("tune.scheduler", what, "write eval_strategy: steps and eval_steps")


def _named(branches: Sequence[Branch]) -> Iterator[Branch]:
    """Branches with names that tell them apart: the method, and where that is not enough what else is fixed."""
    methods = [branch.method.name for branch in branches]
    for branch in branches:
        if methods.count(branch.method.name) == 1:
            yield branch
            continue
        alike = [other for other in branches if other.method is branch.method]
        telling = [
            f"{key}: {shown(value) if not isinstance(value, str) else value}"
            for key, value in branch.fixed.items()
            if any(other.fixed.get(key) != value for other in alike)
        ]
        yield replace(branch, name=f"{branch.method.name} ({', '.join(telling) or f'branch {branch.index}'})")
