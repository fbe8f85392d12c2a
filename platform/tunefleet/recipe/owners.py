"""Whose key is it? Every key has one owner: a section, the selected method, or the choice of the method itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from tunefleet.data.settings import DataSettings
from tunefleet.model_settings import ModelSettings
from tunefleet.recipe.problems import Problem, shown
from tunefleet.recipe.sections import RaySettings, RunSettings
from tunefleet.settings import Settings
from tunefleet.training.settings import TrainingSettings
from tunefleet_strategies import registry
from tunefleet_strategies.contract import Strategy

SECTIONS: Mapping[str, type[Settings]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "run": RunSettings,
    "ray": RaySettings,
}

SAID_OTHERWISE: Mapping[str, str] = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "model": "model_name_or_path",
    "num_workers": "ray_num_workers",
    "rank": "lora_rank",
    "steps": "max_steps",
}
"""Short names that people try, with the documented ones."""


def section_of(key: str) -> str | None:
    """The section that owns a key, if one does."""
    return next((name for name, owner in SECTIONS.items() if key in owner.model_fields), None)


def known_keys() -> frozenset[str]:
    """Every key that some recipe may have."""
    keys = {key for owner in SECTIONS.values() for key in owner.model_fields}
    keys |= {key for method in registry.methods() for key in method.model_fields}
    return frozenset(keys | registry.selector_keys())


def selection(method: type[Strategy]) -> str:
    """What a person writes to select a method."""
    return " and ".join(f"{key}: {_bare(value)}" for key, value in method.selector.items())


def _bare(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def foreign(key: str, owners: tuple[str, ...], method: type[Strategy]) -> Problem:
    """A key of another method than the selected one."""
    what = f"belongs to {' and '.join(owners)}, and this recipe selects {method.name} ({selection(method)})"
    ready = [selection(other) for other in registry.methods() if other.name in owners]
    return Problem(key, what, f"remove {key}, or write {' or '.join(ready)}")


def unknown(key: str) -> Problem:
    """A key that nobody owns."""
    plain = key.lower().replace("-", "_")
    known = known_keys()
    near = [SAID_OTHERWISE[plain]] if plain in SAID_OTHERWISE else []
    near = near or difflib.get_close_matches(plain, sorted(known), n=1, cutoff=0.6)
    if not near:
        return Problem(key, "is no key of a recipe", "remove it; `tunefleet schema` lists every key")
    owners = registry.owners(near[0])
    whose = f" (a key of {' and '.join(owners)})" if owners else ""
    return Problem(key, "is no key of a recipe", f"did you mean {near[0]}{whose}?")
