"""The JSON Schema of a recipe, so that editors complete and check it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, JsonValue

from tunefleet.recipe import owners, peers, tune
from tunefleet.recipe.check import properties
from tunefleet.recipe.tune import TuneSettings
from tunefleet_strategies import registry


def recipe_schema() -> dict[str, JsonValue]:
    """JSON Schema (draft 2020-12) of the flat recipe: the keys of every section and of every method that is there.

    Null stands for the default everywhere. Which keys go together is checked by reading a recipe, not here.
    """
    keys: dict[str, JsonValue] = {}
    for section in owners.SECTIONS.values():
        keys |= _keys_of(section)
    keys |= selectors()
    for method in registry.methods():
        keys |= _keys_of(method)
    keys[tune.KEY] = tune_schema()
    for key, reason in peers.IGNORED.items():
        keys[key] = {"description": f"Accepted and not used, because {reason}.", "deprecated": True}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tunefleet recipe",
        "type": "object",
        "properties": keys,
        "required": [
            name
            for section in owners.SECTIONS.values()
            for name, field in section.model_fields.items()
            if field.is_required()
        ],
        "additionalProperties": False,
    }


def tune_schema() -> dict[str, JsonValue]:
    """The block of a search. Which keys a branch of its space may have is checked by reading it."""
    own: dict[str, JsonValue] = {
        key: {**_or_null(schema), "description": schema["description"]}
        for key, schema in properties(TuneSettings).items()
    }
    block: dict[str, JsonValue] = {
        "type": "object",
        "properties": own,
        "required": ["space"],
        "additionalProperties": False,
    }
    return {
        "description": "Makes the recipe a search, which `tunefleet tune` runs.",
        "anyOf": [block, {"type": "null"}],
    }


def selectors() -> dict[str, JsonValue]:
    """The keys that choose the method."""
    found: dict[str, list[JsonValue]] = {key: [] for key in sorted(registry.selector_keys())}
    for method in registry.methods():
        for key, value in method.selector.items():
            if isinstance(value, str | bool) and value not in found[key]:
                found[key].append(value)
    schemas: dict[str, JsonValue] = {}
    for key, values in found.items():
        switch = not any(isinstance(value, str) for value in values)
        taken = [False, *values] if switch else values
        schemas[key] = {
            "enum": [*taken, None],
            "default": False if switch else registry.DEFAULT_TYPE,
            "description": "Chooses the method" + (", with `finetuning_type: full`." if switch else "."),
        }
    return schemas


def _keys_of(owner: type[BaseModel]) -> dict[str, JsonValue]:
    """The schemas of an owner's keys, null allowed, named after the methods if it is theirs."""
    found: dict[str, JsonValue] = {}
    for key, schema in properties(owner).items():
        about, methods = schema.get("description", ""), registry.owners(key)
        about = f"{' and '.join(methods)}: {about}" if methods else about
        found[key] = {**_or_null(schema), "description": about}
    return found


def _or_null(schema: Mapping[str, Any]) -> dict[str, JsonValue]:
    """The same schema for a key that may also be null."""
    kept = {key: value for key, value in schema.items() if key != "title"}
    if "anyOf" in kept:
        branches = [branch for branch in kept.pop("anyOf") if branch != {"type": "null"}]
        return {**kept, "anyOf": [*branches, {"type": "null"}]}
    shared: dict[str, JsonValue] = {key: kept.pop(key) for key in ("default", "description") if key in kept}
    if "enum" in kept or "const" in kept:
        words = kept.get("enum", [kept["const"]] if "const" in kept else [])
        return {**shared, "enum": [*words, None]}
    return {**shared, "anyOf": [kept, {"type": "null"}]}
