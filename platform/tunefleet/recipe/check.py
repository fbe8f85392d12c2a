"""Values of one owner's keys, checked: types first, then choices, ranges and list pieces, all in plain words."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunefleet.recipe.problems import Problem, shown, split_sentence

M = TypeVar("M", bound=BaseModel, covariant=True)

TYPE_WORDS: Mapping[str, str] = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
_RANGES: Mapping[str, tuple[str, str]] = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


LARGEST = 2**32 - 1
"""The largest whole number that a recipe may hold: that of seeds, and no count needs more."""

_WRONG_PIECES: Mapping[str, str] = {
    "string_type": "is not text",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "int_parsing": "is not a whole number",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
}


@dataclass(frozen=True)
class Checked(Generic[M]):
    """What became of one owner's keys. `values` has every key whose value is known to be good, defaults included."""

    model: M | None
    values: Mapping[str, object]
    problems: tuple[Problem, ...]


@lru_cache(maxsize=64)
def properties(owner: type[BaseModel]) -> Mapping[str, Mapping[str, Any]]:
    """The JSON Schema of each key of an owner."""
    found: dict[str, Mapping[str, Any]] = owner.model_json_schema()["properties"] if owner.model_fields else {}
    return found


def json_types(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """The JSON types that a key takes, null apart; nothing if any is fine."""
    branches: list[Mapping[str, Any]] = schema.get("anyOf", [schema])
    return tuple(dict.fromkeys(b["type"] for b in branches if b.get("type", "null") != "null"))


def choices(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that a key takes, if they are few."""
    branches: list[Mapping[str, Any]] = schema.get("anyOf", [schema])
    return tuple(str(word) for b in branches for word in b.get("enum", [b["const"]] if "const" in b else []))


def check(owner: type[M], keys: Mapping[str, object]) -> Checked[M]:
    """Check the values of an owner's keys. Keys that the owner does not have must not be among them."""
    schemas = properties(owner)
    read: dict[str, object] = {}
    problems: list[Problem] = []
    for key, value in keys.items():
        read[key] = _as_meant(value, schemas[key])
        mismatch = _mismatch(key, read[key], owner)
        if mismatch is not None:
            problems.append(mismatch)
            del read[key]
    model = None
    try:
        model = owner.model_validate(read)
    except ValidationError as error:
        problems += _translated(error, owner, written=frozenset(keys))
    problems += _whole(owner, read, problems)
    bad = {problem.key for problem in problems}
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in owner.model_fields.items()
        if not field.is_required()
    }
    values = {key: value for key, value in (defaults | read).items() if key not in bad}
    return Checked(None if problems else model, values, tuple(problems))


def _as_meant(value: object, schema: Mapping[str, Any]) -> object:
    """What a person means: YAML reads a bare `no` as false, and `1e3` as a fraction."""
    if value is False and "no" in choices(schema):
        return "no"
    types = json_types(schema)
    if isinstance(value, float) and "integer" in types and "number" not in types and value.is_integer():
        return int(value)
    return value


def _json_type(value: object) -> str:
    for kind, name in (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list | tuple, "array"),
        (dict, "object"),
    ):
        if isinstance(value, kind):
            return name
    return "other"


def _mismatch(key: str, value: object, owner: type[BaseModel]) -> Problem | None:
    """Say that a value has another type than its key. pydantic would read `true` as 1 and `"10"` as ten."""
    if isinstance(value, float) and not math.isfinite(value):
        return Problem(key, f"{value} is not a number to train with", _example(key, owner))
    if isinstance(value, int) and abs(value) > LARGEST:
        return Problem(key, f"{shown(value)} is too large", f"write at most {LARGEST}")
    schema = properties(owner)[key]
    types = json_types(schema)
    kind = _json_type(value)
    if not types or kind in types or (kind == "integer" and "number" in types):
        return None
    if kind == "string" and "array" in types:  # an owner that takes lists says itself how it cuts text
        return None
    words = choices(schema) or tuple(TYPE_WORDS[name] for name in types)
    wanted = _either(words)
    if kind == "string" and _is_number(str(value)) and {"integer", "number"} & set(types):
        return Problem(key, f"{shown(value)} is text", f"write {value} without the quotes")
    if types == ("string",) and not choices(schema) and kind in ("integer", "number", "boolean"):
        return Problem(key, f"{shown(value)} is not text", f"write '{shown(value)}' with the quotes if it is a name")
    return Problem(key, f"{shown(value)} is not {wanted}", _example(key, owner))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _either(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _whole(owner: type[BaseModel], read: Mapping[str, object], found: list[Problem]) -> Iterator[Problem]:
    """What is wrong between an owner's own keys, which pydantic tells only once each of them is right alone."""
    bad = {problem.key for problem in found}
    if not bad:
        return
    try:
        owner.model_validate({key: value for key, value in read.items() if key not in bad})
    except ValidationError as error:
        for problem in _translated(error, owner, written=frozenset(read) | bad):
            if problem.key not in bad:
                yield problem


def _translated(error: ValidationError, owner: type[BaseModel], written: frozenset[str]) -> list[Problem]:
    """pydantic's findings in plain words, one for each key."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        problem = _plain(detail, owner, written)
        if detail["type"] != "missing" or problem.key not in written:
            problems.setdefault(problem.key, problem)
    return list(problems.values())


def _plain(detail: ErrorDetails, owner: type[BaseModel], written: frozenset[str]) -> Problem:
    if not detail["loc"]:
        return _between_keys(_reason(detail), owner, written)
    key, kind = str(detail["loc"][0]), detail["type"]
    if kind == "value_error":
        return split_sentence(key, _reason(detail))
    if kind == "missing":
        return Problem(key, "is missing", f"write {key}: and its value")
    if kind == "literal_error":
        return _no_choice(key, detail["input"], owner)
    if kind == "string_pattern_mismatch":
        what = f"{shown(detail['input'])} has characters or a length that it cannot have"
        return Problem(key, what, "use up to 100 letters, digits, dots, dashes and underscores")
    where = _place(detail["loc"][1:])
    if kind in _RANGES:
        words, limit = _RANGES[kind]
        what = f"{where}{shown(detail['input'])} must be {words} {_bound(detail['ctx'][limit])}"
    elif kind in ("string_too_short", "too_short"):
        what = "is empty"
    else:
        what = f"{where}{shown(detail['input'])} {_WRONG_PIECES.get(kind, 'does not fit here')}"
    return Problem(key, what, _example(key, owner))


def _bound(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _reason(detail: ErrorDetails) -> str:
    """The sentence of a check of our own."""
    return str(detail["ctx"]["error"]) if "error" in detail.get("ctx", {}) else detail["msg"]


def _place(loc: tuple[int | str, ...]) -> str:
    """Where inside a list or a mapping something stands."""
    if not loc:
        return ""
    return f"piece {loc[0] + 1}: " if isinstance(loc[0], int) else f"{loc[0]}: "


def _between_keys(sentence: str, owner: type[BaseModel], written: frozenset[str]) -> Problem:
    """A finding about several keys stands at the one that the sentence names first."""
    named = [word for word in re.findall(r"\w+", sentence) if word in owner.model_fields]
    return split_sentence((named or sorted(written) or ["finetuning_type"])[0], sentence)


def _no_choice(key: str, value: object, owner: type[BaseModel]) -> Problem:
    words = choices(properties(owner)[key])
    lower = {word.lower(): word for word in words}
    near = difflib.get_close_matches(str(value).lower(), [*lower], n=1, cutoff=0.5)
    mend = f"did you mean {key}: {lower[near[0]]}?" if near else _example(key, owner)
    return Problem(key, f"{shown(value)} is not {_either(words)}", mend)


def _example(key: str, owner: type[BaseModel]) -> str:
    """A line that would do."""
    default = owner.model_fields[key].get_default(call_default_factory=True)
    if owner.model_fields[key].is_required():
        return f"write {key}: and its value"
    if isinstance(default, tuple):
        default = ", ".join(str(piece) for piece in default) or None
    if default is None or default == {}:
        return f"leave {key} out for its default"
    return f"write for example {key}: {default if isinstance(default, str) else shown(default)}"
