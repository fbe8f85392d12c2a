"""Every method there is: the table below, plus what installed packages add under `tunefleet.strategies`.

To add a method here: write its file, name its class in `BUILT_IN`. A package adds one with an entry point whose value
is a `Strategy` class; it is found by being installed, never by being imported.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.contract import Strategy
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.lora import Lora

ENTRY_POINT_GROUP = "tunefleet.strategies"

BUILT_IN: tuple[type[Strategy], ...] = (Full, Freeze, Lora, GaLore, BAdam)

DEFAULT_TYPE = "lora"


def methods() -> tuple[type[Strategy], ...]:
    """Every method, built in first, then those of installed packages by name.

    Raises:
        StrategyError: an installed package's method cannot be loaded, or its name or selector is taken.
    """
    # sys.path says which packages are installed, so what was found for it holds until it changes.
    return BUILT_IN + _plugins(tuple(sys.path))


def selector_keys() -> frozenset[str]:
    """The keys that choose a method; they belong to the recipe, not to the method."""
    return frozenset(key for method in methods() for key in method.selector)


def owners(key: str) -> tuple[str, ...]:
    """Names of the methods that have an argument of this name."""
    return tuple(method.name for method in methods() if key in method.model_fields)


def select(keys: Mapping[str, object]) -> type[Strategy]:
    """The method that a recipe's choosing keys mean; other keys are passed over.

    Raises:
        StrategyError: the keys contradict each other, or name no method.
    """
    chosen = _chosen(keys)
    for method in methods():
        if chosen == _complete(method.selector):
            return method
    raise _no_method(chosen)


def _complete(selector: Mapping[str, object]) -> dict[str, object]:
    """A selector with every choosing key in it: a switch that it leaves out is off."""
    switches: dict[str, object] = dict.fromkeys(selector_keys(), False)
    return {**switches, "finetuning_type": DEFAULT_TYPE, **selector}


def _chosen(keys: Mapping[str, object]) -> dict[str, object]:
    """The choosing keys of a recipe, checked for type. Null means the default."""
    written = {key: keys[key] for key in sorted(selector_keys()) if keys.get(key) is not None}
    for key, value in written.items():
        if key == "finetuning_type" and not isinstance(value, str):
            raise StrategyError(f"finetuning_type: {value!r} is no method; choose from {_choices()}")
        if key != "finetuning_type" and not isinstance(value, bool):
            raise StrategyError(f"{key}: {value!r} is neither true nor false; write true or false")
    return _complete(written)


def _no_method(chosen: Mapping[str, object]) -> StrategyError:
    """Say why a combination means no method, and what would."""
    switches = [key for key, value in sorted(chosen.items()) if value is True]
    types = {method.selector.get("finetuning_type", DEFAULT_TYPE) for method in methods()}
    if chosen["finetuning_type"] not in types:
        return StrategyError(f"finetuning_type: {chosen['finetuning_type']!r} is no method; choose from {_choices()}")
    if len(switches) > 1:
        return StrategyError(f"{' and '.join(switches)} choose two methods at once; keep one of them")
    return StrategyError(
        f"{switches[0]} trains full weights and finetuning_type is {chosen['finetuning_type']}; "
        f"write finetuning_type: full, or drop {switches[0]}"
    )


def _choices() -> str:
    types = dict.fromkeys(str(method.selector.get("finetuning_type", DEFAULT_TYPE)) for method in methods())
    return ", ".join(types)


@lru_cache(maxsize=8)
def _plugins(path: tuple[str, ...]) -> tuple[type[Strategy], ...]:  # noqa: ARG001 - what the cache goes by
    """Methods of the packages installed along an import path."""
    found: dict[str, type[Strategy]] = {}
    taken = {method.name: f"built in as {method.__module__}" for method in BUILT_IN}
    selectors = [dict(method.selector) for method in BUILT_IN]
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, point.value)):
        method = _load(point)
        if method.name in taken:
            raise StrategyError(
                f"entry point {point.name} = {point.value} adds a method named {method.name}, which is taken "
                f"({taken[method.name]}); rename it or uninstall its package"
            )
        if dict(method.selector) in selectors:
            raise StrategyError(
                f"entry point {point.name} = {point.value} answers to {dict(method.selector)}, which another method "
                "answers to; change its selector or uninstall its package"
            )
        taken[method.name] = f"entry point {point.name} = {point.value}"
        selectors.append(dict(method.selector))
        found[method.name] = method
    return tuple(found[name] for name in sorted(found))


def _load(point: EntryPoint) -> type[Strategy]:
    """Load the class an entry point names and check that it is a finished method."""
    where = f"entry point {point.name} = {point.value} of group {ENTRY_POINT_GROUP}"
    try:
        loaded: object = point.load()
    except Exception as problem:  # a foreign package may fail in any way; the person needs to know which one did
        raise StrategyError(f"{where} cannot be loaded ({problem!r}); mend or uninstall its package") from problem
    if not (isinstance(loaded, type) and issubclass(loaded, Strategy)):
        raise StrategyError(f"{where} is no Strategy class; let it name one, or uninstall its package")
    missing = [field for field in ("name", "summary", "selector") if field not in vars(loaded)]
    if inspect.isabstract(loaded) or missing:
        unfinished = ", ".join([*missing, *sorted(loaded.__abstractmethods__)])
        raise StrategyError(f"{where} leaves out {unfinished}; write them, or uninstall its package")
    return loaded
