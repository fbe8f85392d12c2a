"""Field types that several methods share: lists of names and of numbers, as people write them in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, WithJsonSchema

ALL = "all"


def read_list(value: object) -> object:
    """Cut a comma string into its pieces; a YAML list passes through.

    Raises:
        ValueError: the list is empty or has an empty piece (`"mlp,"`).
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, str):
        pieces: tuple[object, ...] = tuple(piece.strip() for piece in value.split(","))
    elif isinstance(value, (list, tuple)):
        pieces = tuple(piece.strip() if isinstance(piece, str) else piece for piece in value)
    else:
        return value
    if not pieces or any(piece == "" for piece in pieces):
        raise ValueError("has an empty piece; write the names with one comma between them, or leave the key out")
    return pieces


def read_names(value: object) -> object:
    """Cut a comma string into names.

    Raises:
        ValueError: a piece is empty, a name stands twice, or `all` stands beside other names.
    """
    if isinstance(value, int):
        # pydantic reports a ValueError beside the key; a TypeError would end the reading.
        raise ValueError(f"{value!r} is not a name; write module names with commas between them")  # noqa: TRY004
    names = read_list(value)
    if not isinstance(names, tuple):
        return names
    if ALL in names and len(names) > 1:
        raise ValueError("`all` stands for every name, so it cannot stand beside others; write `all` alone or drop it")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` stands twice; write it once")
    return names


_NAMES_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
)
_OPTIONAL_NAMES_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}, {"type": "null"}]}
)
_OPTIONAL_NUMBERS_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer"},
            {"type": "string"},
            {"type": "array", "items": {"type": "integer"}, "minItems": 1},
            {"type": "null"},
        ]
    }
)

Names = Annotated[tuple[str, ...], BeforeValidator(read_names), _NAMES_SCHEMA]
"""A comma string or a YAML list of names."""
OptionalNames = Annotated[tuple[str, ...] | None, BeforeValidator(read_names), _OPTIONAL_NAMES_SCHEMA]
OptionalNumbers = Annotated[tuple[int, ...] | None, BeforeValidator(read_list), _OPTIONAL_NUMBERS_SCHEMA]
"""A comma string or a YAML list of whole numbers."""

BACKEND_WORDS = "Whose optimizer runs: ours, or that of the method's authors, which cannot be resumed."
OptimizerBackend = Literal["native", "upstream"]
"""Whose optimizer runs: ours, or the class of the package that the method's authors published."""
