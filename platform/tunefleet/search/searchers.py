"""One space, compiled for each way of searching it: Ray Tune's searchers, all behind `Suggestions`.

Grid and random are our own: Ray's generator can neither leave out illegal and equal points nor go on after a restart.
Optuna is asked by define-by-run, so that the children of a branch, or of a choice, exist only where they mean something
(Ray's conversion of nested domains hands unresolved ones to trials). HyperOpt and BOHB are given all domains of a
branch; what has no meaning in a point is left out of it afterwards.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ray.tune.search import Searcher
from ray.tune.search.bohb import TuneBOHB

from tunefleet.errors import Refused
from tunefleet.recipe.tune import TuneSettings
from tunefleet.search.domains import rounded
from tunefleet.search.space import Branch, Space
from tunefleet_strategies.contract import Choice, Domain, LogUniform, QUniform, RandInt, Uniform

PACKAGES: Mapping[str, tuple[str, ...]] = {"hyperopt": ("hyperopt",), "bohb": ("hpbandster", "ConfigSpace")}
"""What a way of searching needs beyond our own dependencies."""


@dataclass(frozen=True)
class Suggestion:
    """What a searcher proposes, rules between keys not looked at."""

    branch: int
    values: Mapping[str, object]


class Suggestions(Protocol):
    """A searcher over the space. `ask` and `tell` are paired by an identifier of the caller's choice."""

    def ask(self, identifier: str) -> Suggestion | None:
        """The next proposal; None = there are no more."""

    def hear(self, identifier: str, result: dict[str, Any]) -> None:
        """Figures of a proposal that goes on."""

    def tell(self, identifier: str, result: dict[str, Any] | None) -> None:
        """How a proposal ended: its last figures, or None where it has none."""

    def pause(self, identifier: str, paused: bool) -> None:
        """A proposal's trial is paused, or goes on."""

    def state(self) -> bytes:
        """Everything that it has learned."""

    def restore(self, state: bytes) -> None:
        """Go on from what `state` returned."""


def refuse_missing(search: str) -> None:
    """See that a way of searching is installed.

    Raises:
        Refused: it is not.
    """
    missing = [name for name in PACKAGES.get(search, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            f"search: {search} needs {' and '.join(missing)}, not installed here: run `pip install "
            f"'tunefleet[{search}]'`, or write search: optuna."
        )


def suggestions(space: Space, tune: TuneSettings, seed: int) -> Suggestions:
    """The searcher that a search asks for.

    Raises:
        Refused: its package is not installed.
    """
    refuse_missing(tune.search)
    if tune.search == "grid":
        return Listed(lambda: (Suggestion(point.branch, point.values) for point in space.points()))
    if tune.search == "random":
        return Listed(lambda: _endless(space, seed))
    searcher = _searcher(space, tune, seed)
    return Bohb(searcher, space, tune.metrics[0], seed) if isinstance(searcher, TuneBOHB) else Asked(searcher, space)


@dataclass(frozen=True)
class Pool:
    """Points that one searcher chooses: those of all branches, or of one alone."""

    space: Space
    searcher: Suggestions
    samples: int | None
    """Trials in all; None = as many as there are points."""
    branch: int | None = None
    """None = all."""

    def holds(self, branch: int) -> bool:
        return self.branch is None or self.branch == branch


def pools(space: Space, tune: TuneSettings, samples: int | None, seed: int) -> list[Pool]:
    """One pool, or where branches share the trials one for each, so that none takes some from another or learns of it.

    Raises:
        Refused: the searcher's package is not installed.
    """
    if not tune.shares:
        return [Pool(space, suggestions(space, tune, seed), samples)]
    found = []
    for branch in space.branches:
        alone = Space((branch,))
        share = None if samples is None else samples // len(space.branches)
        found.append(Pool(alone, suggestions(alone, tune, seed), share, branch.index))
    return found


def _endless(space: Space, seed: int) -> Iterator[Suggestion]:
    chance = random.Random(seed)
    while True:
        yield Suggestion(*space.draw(chance))


class Listed:
    """Proposals that depend on nothing but their number. Its state is how many there were."""

    def __init__(self, begin: Callable[[], Iterator[Suggestion]]) -> None:
        self._begin, self._asked = begin, 0
        self._source = begin()

    def ask(self, identifier: str) -> Suggestion | None:
        self._asked += 1
        return next(self._source, None)

    def hear(self, identifier: str, result: dict[str, Any]) -> None:
        """It learns nothing."""

    def tell(self, identifier: str, result: dict[str, Any] | None) -> None:
        """It learns nothing."""

    def pause(self, identifier: str, paused: bool) -> None:
        """It learns nothing."""

    def state(self) -> bytes:
        return str(self._asked).encode()

    def restore(self, state: bytes) -> None:
        self._asked = int(state)
        self._source = itertools.islice(self._begin(), self._asked, None)


class Asked:
    """A searcher of Ray Tune's."""

    def __init__(self, searcher: Searcher, space: Space) -> None:
        self.searcher, self._space = searcher, space

    def ask(self, identifier: str) -> Suggestion | None:
        raw: Any = self.searcher.suggest(identifier)
        if raw is None or raw == Searcher.FINISHED:
            return None
        return _read(raw.get("point", raw), self._space)

    def hear(self, identifier: str, result: dict[str, Any]) -> None:
        self.searcher.on_trial_result(identifier, result)

    def tell(self, identifier: str, result: dict[str, Any] | None) -> None:
        self.searcher.on_trial_complete(identifier, result, error=result is None)

    def pause(self, identifier: str, paused: bool) -> None:
        """It does not mind."""

    def state(self) -> bytes:
        with tempfile.TemporaryDirectory(prefix="tunefleet-") as folder:
            file = Path(folder) / "state"
            self.searcher.save(str(file))
            return file.read_bytes()

    def restore(self, state: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="tunefleet-") as folder:
            file = Path(folder) / "state"
            file.write_bytes(state)
            self.searcher.restore(str(file))


class Bohb(Asked):
    """BOHB, which models the losses of each budget, and proposes by the largest one of which it has heard enough.

    Ray tells it of losses at HyperBand's rungs, but not of those that a trial ends with: they are told here. A budget
    is steps. It draws by numpy's global generator, so that gets a state of ours meanwhile: else a search would depend
    on what else this process draws, and could not go on from where it was.
    """

    def __init__(self, searcher: TuneBOHB, space: Space, metric: str, seed: int) -> None:
        super().__init__(searcher, space)
        self.searcher: TuneBOHB = searcher
        self._metric = metric
        self._random = np.random.RandomState(seed).get_state()
        self._heard: dict[str, int] = {}
        """The largest budget of which it knows a proposal's loss."""

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        others = np.random.get_state()
        np.random.set_state(self._random)
        try:
            yield
        finally:
            self._random = np.random.get_state()
            np.random.set_state(others)

    def ask(self, identifier: str) -> Suggestion | None:
        with self._drawing():
            return super().ask(identifier)

    def hear(self, identifier: str, result: dict[str, Any]) -> None:
        """Learn from what comes with a budget: a rung's last figures."""
        if "budget" in result.get("hyperband_info", {}):
            self._learn(identifier, result)

    def tell(self, identifier: str, result: dict[str, Any] | None) -> None:
        if result is not None:
            self._learn(identifier, result)
        super().tell(identifier, result)

    def pause(self, identifier: str, paused: bool) -> None:
        (self.searcher.on_pause if paused else self.searcher.on_unpause)(identifier)

    def _learn(self, identifier: str, result: dict[str, Any]) -> None:
        loss, budget = result.get(self._metric), int(result["step"])
        if loss is None or budget <= self._heard.get(identifier, 0):
            return
        self._heard[identifier] = budget
        with self._drawing():
            self.searcher.on_trial_result(identifier, {self._metric: loss, "hyperband_info": {"budget": budget}})

    def state(self) -> bytes:
        return packed(searcher=super().state(), random=self._random, heard=self._heard)

    def restore(self, state: bytes) -> None:
        kept = unpacked(state)
        super().restore(kept["searcher"])
        self._random, self._heard = kept["random"], kept["heard"]


def _read(raw: Mapping[str, Any], space: Space) -> Suggestion:
    """A proposal from the places in which the domains were compiled: choices come as their number."""
    branch = space.branches[int(raw.get("branch", 0))]
    chosen: dict[str, object] = {}
    for key, domain in branch.domains.items():
        name = f"{branch.index}.{key}"
        if name in raw and branch.has_meaning(key, chosen):
            chosen[key] = _value(raw[name], domain)
    return Suggestion(branch.index, chosen)


def _value(raw: Any, domain: Domain) -> object:
    match domain:
        case Choice(values):
            return values[int(raw)]
        case RandInt():
            return int(raw)
        case QUniform(low, _, step):
            return rounded(low + round((float(raw) - low) / step) * step, domain)
        case Uniform() | LogUniform():
            return rounded(float(raw), domain)


def _searcher(space: Space, tune: TuneSettings, seed: int) -> Searcher:
    several = len(tune.metrics) > 1
    metric: Any = list(tune.metrics) if several else tune.metrics[0]
    mode: Any = list(tune.modes) if several else tune.modes[0]
    if tune.search == "optuna":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(space=DefineByRun(space), metric=metric, mode=mode, seed=seed)
    if tune.search == "hyperopt":
        from ray.tune.search.hyperopt import HyperOptSearch

        return HyperOptSearch(
            space=hyperopt_space(space), metric=metric, mode=mode, random_state_seed=seed, n_initial_points=10
        )
    logging.getLogger("hpbandster").setLevel(logging.ERROR)  # it warns whenever a choice has not been tried enough
    return TuneBOHB(space=bohb_space(space.branches[0], seed), metric=metric, mode=mode, seed=seed)


def _ranked(domain: Choice) -> bool:
    """Whether a choice is of numbers in rising order, so that neighbours are alike."""
    numbers = [value for value in domain.values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(domain.values) > 2 and numbers == sorted(numbers)


class DefineByRun:
    """The space as Optuna asks for it: a function that samples from a trial what exists, one key after the other."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def __call__(self, trial: Any) -> dict[str, Any]:
        index = 0
        if len(self.space.branches) > 1:
            index = trial.suggest_categorical("branch", list(range(len(self.space.branches))))
        branch = self.space.branches[index]
        raw: dict[str, Any] = {"branch": index}
        chosen: dict[str, object] = {}
        for key, domain in branch.domains.items():
            if branch.has_meaning(key, chosen):
                name = f"{branch.index}.{key}"
                raw[name] = _suggest(trial, name, domain)
                chosen[key] = _value(raw[name], domain)
        return {"point": raw}


def _suggest(trial: Any, name: str, domain: Domain) -> Any:
    match domain:
        case Choice(values) if _ranked(domain):
            return trial.suggest_int(name, 0, len(values) - 1)
        case Choice(values):
            return trial.suggest_categorical(name, list(range(len(values))))
        case RandInt(low, high):
            return trial.suggest_int(name, low, high - 1)
        case Uniform(low, high):
            return trial.suggest_float(name, low, high)
        case LogUniform(low, high):
            return trial.suggest_float(name, low, high, log=True)
        case QUniform(low, high, step):
            return trial.suggest_float(name, low, high, step=step)


def hyperopt_space(space: Space) -> dict[str, Any]:
    """The space as HyperOpt takes it: a choice of branches, each with all of its domains."""
    from hyperopt import hp

    def node(name: str, domain: Domain) -> Any:
        match domain:
            case Choice(values):
                return hp.randint(name, len(values))
            case RandInt(low, high):
                return hp.randint(name, low, high)
            case Uniform(low, high):
                return hp.uniform(name, low, high)
            case LogUniform(low, high):
                return hp.loguniform(name, float(np.log(low)), float(np.log(high)))
            case QUniform(low, high, step):
                return hp.quniform(name, low, high, step)

    branches = [
        {
            "branch": position,
            **{f"{branch.index}.{key}": node(f"{branch.index}.{key}", one) for key, one in branch.domains.items()},
        }
        for position, branch in enumerate(space.branches)
    ]
    return {"point": hp.choice("branch", branches)}


def bohb_space(branch: Branch, seed: int) -> Any:
    """One branch as BOHB takes it."""
    import ConfigSpace

    made = ConfigSpace.ConfigurationSpace(seed=seed)
    for key, domain in branch.domains.items():
        name = f"{branch.index}.{key}"
        match domain:
            case Choice(values):
                made.add(ConfigSpace.CategoricalHyperparameter(name, list(range(len(values)))))
            case RandInt(low, high):
                made.add(ConfigSpace.UniformIntegerHyperparameter(name, low, high - 1))
            case Uniform(low, high) | QUniform(low, high):
                made.add(ConfigSpace.UniformFloatHyperparameter(name, low, high))
            case LogUniform(low, high):
                made.add(ConfigSpace.UniformFloatHyperparameter(name, low, high, log=True))
    return made


def packed(**parts: object) -> bytes:
    """Several states as one."""
    return pickle.dumps(parts)


def unpacked(state: bytes) -> dict[str, Any]:
    """What `packed` took. Only what this program wrote is read."""
    found: dict[str, Any] = pickle.loads(state)
    return found
