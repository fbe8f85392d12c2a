"""What is wrong with a recipe, in plain words: the key, what is wrong, how to mend it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass

from tunefleet.errors import Refused

LONGEST_VALUE = 80
"""Characters of a value that a problem shows."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe."""

    key: str
    what: str
    mend: str = ""

    def line(self) -> str:
        """The problem as one line of text."""
        said = self.what if self.what.startswith(self.key) else f"{self.key}: {self.what}"
        return " ".join((f"{said}; {self.mend}" if self.mend else said).split())


class RecipeError(Refused):
    """Everything that is wrong with a recipe, at once. Its text has one line for each problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(problem.line() for problem in self.problems)


def split_sentence(key: str, sentence: str) -> Problem:
    """A problem from a sentence of the form `what; mend`, which may or may not begin with the key."""
    what, _, mend = sentence.removeprefix(f"{key}:").strip().partition("; ")
    return Problem(key, what, mend)


def shown(value: object) -> str:
    """A value as it stands in a recipe, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | int):
        return str(value) if abs(value) < 1e30 or isinstance(value, float) else "a number of that size"
    text = _SHORT.repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
