"""The space of a search, without Ray: branches, what is sampled in each, and the recipes that points stand for.

A branch is a method (or a form of one) with fixed keys and domains. A point is a branch with a value for each domain
that has a meaning there: `badam_mask_mode` has none in layer mode, so it is not sampled. Two points are equal if their
recipes are, after defaults.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from tunefleet.errors import Refused
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import RaySettings, Recipe, RunSettings
from tunefleet.search import domains
from tunefleet_strategies.contract import Choice, Domain, Strategy

WISH = "ray_num_workers"
PLACEMENT = frozenset({WISH, "resources_per_worker", "placement_strategy"})
"""Ray's keys that a branch may have: an order where to run."""
MOST_TRIED = 4096
"""Points of a branch that are looked through for one that can run."""
MOST_SWITCHES = 512
"""Combinations of words and switches that are looked through for what depends on what."""
Values = Mapping[str, object]

_SMALL = 64
"""Most values of a domain that are tried one by one."""


def _all_values(domain: Domain) -> Sequence[object]:
    held = domains.values(domain)
    if held is None:
        raise ValueError(f"{domain} has no end of values")
    return held


def _telling_values(domain: Domain) -> Sequence[object]:
    held = domains.values(domain)
    return domains.ends(domain) if held is None or len(held) > _SMALL else held


@dataclass(frozen=True)
class Point:
    """One trial's place in the space."""

    branch: int
    values: Mapping[str, JsonValue]
    """What was sampled, by key; nothing that has no meaning beside the rest."""
    digest: str
    """Of the recipe after defaults: equal points have equal ones."""
    seed: int | None = None
    """Its own, where it is another's repeat under another seed."""


@dataclass(frozen=True)
class Branch:
    """One branch: what is fixed, and what is sampled in which order."""

    index: int
    name: str
    method: type[Strategy]
    shared: Values = field(repr=False)
    """The keys of the recipe above `tune` that hold here."""
    fixed: Values
    """The branch's own fixed keys."""
    domains: Mapping[str, Domain]
    """In the order of sampling: keys that others depend on first."""

    @property
    def orders_workers(self) -> bool:
        """Whether the branch itself says how many workers, instead of wishing."""
        return WISH in self.fixed or WISH in self.domains

    def keys(self, values: Values) -> dict[str, object]:
        """The flat keys of a point's recipe, as a person would have written them."""
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {**self.shared, **self.fixed, **listed}

    def recipe(self, values: Values) -> Recipe:
        """The recipe of a point, workers as written.

        Raises:
            Refused: a rule between its keys is broken.
        """
        return read_flat(self.keys(values))

    def has_meaning(self, key: str, chosen: Values) -> bool:
        """Whether a key does anything beside the keys that were chosen before it."""
        return key not in idle(self.method, {**self.shared, **self.fixed, **chosen})

    def point(self, values: Values) -> Point:
        """The point of these values.

        Raises:
            Refused: the recipe rules refuse it.
        """
        recipe = self.recipe(values)
        flat = recipe.flat()
        ignored = (set(RunSettings.model_fields) | set(RaySettings.model_fields)) - PLACEMENT
        same = {key: value for key, value in flat.items() if key not in ignored | set(recipe.method.unused())}
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        meant: dict[str, JsonValue] = {key: flat[key] for key in self.domains if key in values and key in same}
        return Point(self.index, meant, digest[:12])

    def draw(self, chance: random.Random) -> dict[str, object]:
        """Values at random; rules between keys are not looked at."""
        chosen: dict[str, object] = {}
        for key, domain in self.domains.items():
            if self.has_meaning(key, chosen):
                chosen[key] = domains.draw(domain, chance)
        return chosen

    @property
    def continuous(self) -> str | None:
        """The first key with no end of values."""
        return next((key for key, domain in self.domains.items() if domains.values(domain) is None), None)

    def every(self) -> Iterator[dict[str, object]]:
        """All combinations of the values of finite domains, children only where they have a meaning."""
        return self._combinations(_all_values, {})

    def outlines(self) -> Iterator[dict[str, object]]:
        """Combinations of all values of small domains and of the limits of the others."""
        return self._combinations(_telling_values, {})

    def _combinations(
        self, values_of: Callable[[Domain], Sequence[object]], chosen: Values
    ) -> Iterator[dict[str, object]]:
        key = next((key for key in self.domains if key not in chosen and self.has_meaning(key, chosen)), None)
        if key is None:
            yield dict(chosen)
            return
        for value in values_of(self.domains[key]):
            yield from self._combinations(values_of, {**chosen, key: value})

    def legal_outlines(self) -> Iterator[dict[str, object]]:
        """Those that the recipe rules allow."""
        for values in itertools.islice(self.outlines(), MOST_TRIED):
            try:
                self.recipe(values)
            except Refused:
                continue
            yield values


@dataclass(frozen=True)
class Space:
    """All branches."""

    branches: tuple[Branch, ...]
    notices: tuple[str, ...] = ()

    def common_recipe(self) -> Recipe:
        """The recipe of some point: for the keys that all trials share."""
        first = self.branches[0]
        return first.recipe(next(first.legal_outlines()))

    def point(self, branch: int, values: Values) -> Point:
        """As `Branch.point`."""
        return self.branches[branch].point(values)

    @property
    def finite(self) -> bool:
        """Whether the points can be counted."""
        return all(branch.continuous is None for branch in self.branches)

    def points(self) -> Iterator[Point]:
        """Every legal point of a finite space once, branch by branch."""
        seen: set[str] = set()
        for branch in self.branches:
            for values in branch.every():
                try:
                    point = branch.point(values)
                except Refused:
                    continue
                if point.digest not in seen:
                    seen.add(point.digest)
                    yield point

    def draw(self, chance: random.Random) -> tuple[int, dict[str, object]]:
        """A branch and values at random, each branch as likely as the others."""
        branch = self.branches[chance.randrange(len(self.branches))]
        return branch.index, branch.draw(chance)


def idle(method: type[Strategy], keys: Values) -> frozenset[str]:
    """Keys of a method that do nothing beside these; none where these do not go together anyway."""
    own = {key: value for key, value in keys.items() if key in method.model_fields and value is not None}
    try:
        return frozenset(method.model_validate(own).unused())
    except ValueError:
        return frozenset()


def in_order(method: type[Strategy], keys: Values, searched: Mapping[str, Domain]) -> dict[str, Domain]:
    """Domains with those first that decide whether others have a meaning, else as written.

    Only words and switches can decide that, so their combinations are tried.
    """
    switches = {
        key: domain.values
        for key, domain in searched.items()
        if isinstance(domain, Choice) and all(isinstance(value, str | bool) for value in domain.values)
    }
    weight = dict.fromkeys(searched, 0)
    combinations = itertools.islice(itertools.product(*switches.values()), MOST_SWITCHES)
    for combination in combinations:
        chosen = dict(zip(switches, combination, strict=True))
        here = idle(method, {**keys, **chosen}) & set(searched)
        for key, held in switches.items():
            others = (idle(method, {**keys, **chosen, key: value}) & set(searched) for value in held)
            weight[key] = max(weight[key], *(len((here ^ other) - {key}) for other in others))
    ranked = sorted(searched, key=lambda key: -min(weight[key], 1))
    return {key: searched[key] for key in ranked}
