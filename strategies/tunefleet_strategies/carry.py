"""A run goes on under other values, with its state: which values those may be, and what becomes of the state.

For searches that change values on the way (population based training). The learning rate needs nothing: it is set anew
before each update.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from tunefleet_strategies.contract import Saved, Strategy
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.carrying import decayed

SHARED = frozenset({"learning_rate", "weight_decay"})
"""Arguments of no method that may change."""
_Method = TypeVar("_Method", bound=Strategy)


def mutable_keys(method: Strategy) -> frozenset[str]:
    """Everything that may change between two updates of a run by this method."""
    return SHARED | {key for key, reason in method.mutable().items() if reason is None}


def carry(saved: Saved, before: _Method, now: _Method, weight_decay: float, seed: int) -> Saved:
    """The state of a run by `before` as one by `now` goes on from it.

    Args:
        weight_decay: from now on.
        seed: what new directions are drawn by.

    Raises:
        StrategyError: an argument that may not change differs, or the state does not allow it; the argument is named.
    """
    if type(before) is not type(now):
        raise StrategyError(f"a run by {before.name} cannot go on by {now.name}; keep the method")
    old, new = before.model_dump(), now.model_dump()
    changed = {key for key in old if old[key] != new[key]} - before.free
    reasons = before.mutable()
    for key in sorted(changed - mutable_keys(before)):
        why = reasons.get(key) or f"{before.name} knows of no way to take its state along"
        raise StrategyError(f"{key} cannot change while a run goes on: {why}; keep {key}: {old[key]}")
    moved = before.carried(saved, now, seed) if changed else saved
    return replace(moved, optimizer=decayed(moved.optimizer, weight_decay))
