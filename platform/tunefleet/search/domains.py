"""Domains: what a searched key may be. How they are written, which values they hold, how one is drawn."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping, Sequence

from tunefleet.recipe.problems import shown
from tunefleet_strategies.contract import Choice, Domain, LogUniform, QUniform, RandInt, Uniform

FORMS: Mapping[str, str] = {
    "choice": "choice: [4, 8, 16]",
    "uniform": "uniform: [0, 0.1]",
    "loguniform": "loguniform: [1e-5, 1e-3]",
    "quniform": "quniform: [0, 0.1, 0.02]",
    "randint": "randint: [10, 100]",
}
"""Each domain as it is written."""
DIGITS = 5
"""Significant digits of what is drawn from a continuous domain: a rate that people can read and write again."""


def is_domain(value: object) -> bool:
    """Whether a value of a space is meant as a domain: a mapping of one word."""
    return isinstance(value, Mapping) and len(value) == 1 and all(isinstance(word, str) for word in value)


def read_domain(value: Mapping[str, object]) -> Domain:
    """A domain from `{word: arguments}`.

    Raises:
        ValueError: a sentence of the form "what; mend".
    """
    ((word, arguments),) = value.items()
    if word not in FORMS:
        near = difflib.get_close_matches(word, FORMS, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]}?" if near else f"write one of {', '.join(FORMS)}"
        raise ValueError(f"{word} is no domain; {mend}")
    if not isinstance(arguments, list | tuple):
        raise ValueError(  # noqa: TRY004 - told like the others
            f"{word} takes a list, not {shown(arguments)}; write {{{FORMS[word]}}}"
        )
    return _read_choice(arguments) if word == "choice" else _read_range(word, arguments)


def _read_choice(values: Sequence[object]) -> Choice:
    if not values:
        raise ValueError(f"choice has nothing to choose from; write {{{FORMS['choice']}}}")
    if any(value is None or isinstance(value, Mapping) for value in values):
        raise ValueError("choice takes plain values, no null and no mapping; leave the key out for its default")
    plain = tuple(tuple(value) if isinstance(value, list) else value for value in values)
    twice = next((value for place, value in enumerate(plain) if _among(value, plain[:place])), None)
    if twice is not None:
        raise ValueError(f"choice has {shown(twice)} twice; write it once")
    return Choice(plain)


def _among(value: object, others: Sequence[object]) -> bool:
    """Whether an equal value of the same kind is there: true is not 1."""
    return any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in others)


def _read_range(word: str, arguments: Sequence[object]) -> Domain:
    wanted = 3 if word == "quniform" else 2
    numbers = [one for one in arguments if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) < len(arguments) or len(numbers) != wanted or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{word} takes {wanted} numbers; write {{{FORMS[word]}}}")
    low, high = numbers[:2]
    if low >= high:
        raise ValueError(f"{word} goes from {low:g} to {high:g}, which is no way up; write the smaller number first")
    if word == "loguniform" and low <= 0:
        raise ValueError(f"loguniform from {low:g} has no logarithm; begin above 0")
    if word == "randint":
        if any(number != int(number) for number in numbers):
            raise ValueError("randint takes whole numbers; write uniform for others")
        return RandInt(int(low), int(high))
    if word == "quniform":
        if not 0 < numbers[2] <= high - low:
            raise ValueError(f"quniform has steps of {numbers[2]:g} from {low:g} to {high:g}; write a step that fits")
        return QUniform(float(low), float(high), float(numbers[2]))
    return LogUniform(float(low), float(high)) if word == "loguniform" else Uniform(float(low), float(high))


def values(domain: Domain) -> Sequence[object] | None:
    """Every value of a domain; None where there is no end of them."""
    match domain:
        case Choice(chosen):
            return chosen
        case RandInt(low, high):
            return range(low, high)
        case QUniform(low, high, step):
            return [rounded(low + place * step, domain) for place in range(int((high - low) / step + 1e-9) + 1)]
        case _:
            return None


def ends(domain: Domain) -> Sequence[object]:
    """The values that must be right for all to be: each one of a choice, the limits of a range."""
    match domain:
        case Choice(chosen):
            return chosen
        case RandInt(low, high):
            return (low, high - 1)
        case Uniform(low, high) | LogUniform(low, high) | QUniform(low, high):
            return (low, high)


def draw(domain: Domain, chance: random.Random) -> object:
    """One value at random."""
    match domain:
        case LogUniform(low, high):
            return rounded(math.exp(chance.uniform(math.log(low), math.log(high))), domain)
        case Uniform(low, high):
            return rounded(chance.uniform(low, high), domain)
        case _:
            held = values(domain)
            assert held is not None
            return held[chance.randrange(len(held))]


def rounded(value: float, domain: Uniform | LogUniform | QUniform) -> float:
    """A number as people would write it, inside the domain."""
    return min(max(float(f"{value:.{DIGITS}g}"), domain.low), domain.high)


def in_words(domain: Domain) -> str:
    """A domain, short."""
    match domain:
        case Choice(chosen):
            return " | ".join(word(value) for value in chosen)
        case RandInt(low, high):
            return f"{low} to {high - 1}"
        case LogUniform(low, high):
            return f"{low:g} to {high:g}, log"
        case Uniform(low, high):
            return f"{low:g} to {high:g}"
        case QUniform(low, high, step):
            return f"{low:g} to {high:g} by {step:g}"


def word(value: object) -> str:
    """A value as it stands in a recipe, without quotes."""
    if isinstance(value, tuple):
        return ", ".join(word(piece) for piece in value)
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else shown(value)
