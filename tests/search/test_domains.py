"""Domains: how each is written, what it holds, what is drawn from it."""

from __future__ import annotations

import random

import pytest

from tunefleet.search.domains import FORMS, draw, ends, in_words, is_domain, read_domain, values
from tunefleet_strategies.contract import Choice, LogUniform, QUniform, RandInt, Uniform

ALL = (
    ({"choice": [4, 8]}, Choice((4, 8)), "4 | 8"),
    ({"uniform": [0, 0.1]}, Uniform(0.0, 0.1), "0 to 0.1"),
    ({"loguniform": [1e-5, 1e-3]}, LogUniform(1e-5, 1e-3), "1e-05 to 0.001, log"),
    ({"quniform": [0, 0.1, 0.02]}, QUniform(0.0, 0.1, 0.02), "0 to 0.1 by 0.02"),
    ({"randint": [10, 13]}, RandInt(10, 13), "10 to 12"),
)


def test_every_form_is_tried_here() -> None:
    assert {next(iter(written)) for written, _, _ in ALL} == set(FORMS)


@pytest.mark.parametrize(("written", "domain", "words"), ALL)
def test_domains_are_read_and_said(written: dict[str, object], domain: object, words: str) -> None:
    assert is_domain(written)
    read = read_domain(written)
    assert read == domain
    assert in_words(read) == words


def test_the_values_of_finite_domains() -> None:
    assert values(QUniform(0.0, 0.1, 0.03)) == [0.0, 0.03, 0.06, 0.09]
    assert list(values(RandInt(1, 4)) or ()) == [1, 2, 3]
    assert values(Uniform(0, 1)) is None
    assert ends(RandInt(1, 4)) == (1, 3)


@pytest.mark.parametrize("domain", [domain for _, domain, _ in ALL])
def test_what_is_drawn_comes_from_all_of_the_domain(domain: Choice | Uniform | LogUniform | QUniform | RandInt) -> None:
    chance = random.Random(3)
    drawn = [draw(domain, chance) for _ in range(300)]
    held = values(domain)
    if held is not None:
        assert set(drawn) == set(held)
        return
    low, high = (float(str(end)) for end in ends(domain))
    assert all(low <= float(str(value)) <= high for value in drawn)
    assert len(set(drawn)) > 250


def test_lists_may_be_chosen_and_true_is_not_one() -> None:
    assert read_domain({"choice": [["q_proj", "v_proj"], "all"]}) == Choice((("q_proj", "v_proj"), "all"))
    assert read_domain({"choice": [True, 1]}) == Choice((True, 1))
