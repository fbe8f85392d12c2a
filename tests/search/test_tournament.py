"""Methods are compared by the mean over seeds that had no part in choosing their finalists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.search.illegal import BASE
from tests.search.test_book import trial

from tunefleet.recipe.read import read_flat
from tunefleet.recipe.tune import TuneSettings, search_from
from tunefleet.search.book import Book
from tunefleet.search.ending import tournament_table, winning
from tunefleet.search.tournament import as_json, finalists, reseeded, samples, standings, winner
from tunefleet.storage import place


def settings(**block: object) -> TuneSettings:
    return search_from({"tune": {"space": "auto", "tournament": True, **block}}).tune


@pytest.fixture
def book(tmp_path: Path) -> Book:
    """LoRA's best trial is the better one by itself; over seeds BAdam's is, but for one that failed."""
    made = Book(place(tmp_path))
    made.trials = [
        trial(1, "finished", 2.0, 1.0),
        trial(2, "stopped", 0.5),
        trial(3, "finished", 2.0, 1.5, branch="badam"),
        replace(trial(4, "finished", 1.6), repeats=1, seed=43),
        replace(trial(5, "finished", 1.4, branch="badam"), repeats=3, seed=43),
        replace(trial(6, "finished", 2.0), repeats=1, seed=44),
        replace(trial(7, "failed", branch="badam"), repeats=3, seed=44),
        replace(trial(8, "finished", 1.5, branch="badam"), repeats=3, seed=45),
    ]
    return made


def test_the_winner_has_the_best_mean_not_the_best_trial(book: Book) -> None:
    tune = settings()
    assert [one.number for one in finalists(book, tune)] == [1, 3]
    first, second = ranked = standings(book, tune)
    assert (first.branch_name, first.values, first.trials, first.steps) == ("badam", (1.4, 1.5), 1, 20)
    assert (second.branch_name, second.values, second.trials, second.steps) == ("lora", (1.6, 2.0), 2, 30)
    assert [one.mean for one in ranked] == pytest.approx([1.45, 1.8])
    assert [one.spread for one in ranked] == pytest.approx([0.0707, 0.2828], abs=1e-4)
    assert winner(ranked) is first
    assert [one.number for one in winning(book, tune)] == [3]
    assert standings(book, settings(mode="max"))[0].branch_name == "lora"


def test_without_a_whole_repeat_there_is_no_winner_and_the_best_trial_comes_home(book: Book) -> None:
    book.trials = book.sampled
    ranked = standings(book, settings())
    assert winner(ranked) is None
    assert [one.number for one in winning(book, settings())] == [1]
    assert [one.spread for one in ranked] == [None, None]


def test_the_report_names_the_winner_with_mean_and_spread(book: Book) -> None:
    tune = settings()
    console = Console(width=140, record=True)
    console.print(tournament_table(standings(book, tune), tune))
    text = console.export_text()
    assert "badam wins" in text
    assert all(figure in text for figure in ("1.4500", "0.0707", "1.8000", "0.2828"))
    told: Any = as_json(standings(book, tune), tune)
    assert told["winner"] == "badam"
    assert told["methods"][1]["values"] == [1.6, 2.0]


def test_the_default_number_of_trials_is_one_that_the_branches_share() -> None:
    assert [samples(settings(), branches) for branches in (2, 3, 5)] == [10, 12, 10]


def test_a_seed_changes_what_is_drawn_but_not_which_rows_are_held_out() -> None:
    assert reseeded(43, read_flat({**BASE, "seed": 42})) == {"seed": 43}
    drawn = {**BASE, "eval_dataset": None, "val_size": 0.1, "seed": 42}
    assert reseeded(43, read_flat(drawn)) == {"seed": 43, "data_seed": 42}
