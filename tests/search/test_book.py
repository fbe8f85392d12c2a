"""The book: kept whole, read back, and what is made of it at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import JsonValue
from rich.console import Console

from tunefleet.errors import Refused
from tunefleet.recipe.tune import TuneSettings, search_from
from tunefleet.search.board import Progress
from tunefleet.search.book import Book, Report, State, Trial, best, front
from tunefleet.search.ending import result_table, trials_columns
from tunefleet.search.live import TrialLines, remaining, trials_table
from tunefleet.search.plots import best_so_far, best_so_far_plot, trials_plot
from tunefleet.search.space import Point
from tunefleet.search.tournament import best_of_branches, finalists
from tunefleet.storage import place


def trial(number: int, state: State, *losses: float, branch: str = "lora", seconds: float = 1.0) -> Trial:
    reports: list[Report] = [
        {"step": 10 * place, "eval_loss": loss, "seconds": seconds} for place, loss in enumerate(losses, 1)
    ]
    values: dict[str, JsonValue] = (
        {"lora_rank": 4 * number} if branch == "lora" else {"badam_mode": "ratio", "learning_rate": 1e-4}
    )
    return Trial(
        number,
        f"trial_{number:04d}_{number:012d}",
        0,
        branch,
        branch,
        values,
        f"{number:012d}",
        workers=1,
        state=state,
        reports=reports,
        steps=10 * len(losses),
        updates=20,
        error="step 3: odd" if state == "failed" else None,
    )


TRIALS = [
    trial(1, "finished", 3.0, 2.5),
    trial(2, "stopped", 1.0),
    trial(3, "finished", 2.8, 2.2),
    trial(4, "failed"),
    trial(5, "finished", 2.9, 2.4, branch="badam", seconds=0.5),
    trial(6, "running", 2.6),
]


@pytest.fixture
def book(tmp_path: Path) -> Book:
    made = Book(place(tmp_path))
    made.trials = list(TRIALS)
    return made


@pytest.fixture
def tune() -> TuneSettings:
    return search_from({"tune": {"space": "auto"}}).tune


def test_a_book_is_read_back_as_it_was(book: Book, tmp_path: Path) -> None:
    book.searched, book.seconds = {"max_steps": 20}, 100.0
    book.save()
    again = Book(place(tmp_path))
    assert again.trials == TRIALS
    assert again.searched == {"max_steps": 20}
    assert 100 <= again.elapsed() < 130
    assert not again.complete


def test_a_damaged_book_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.json").write_text('{"trials": [')
    with pytest.raises(Refused, match="is damaged, so the search cannot go on"):
        Book(place(tmp_path))


def test_the_best_is_the_best_of_the_whole_trials(tune: TuneSettings, book: Book) -> None:
    found = best(TRIALS, "eval_loss", "min")
    assert found is not None
    assert found.number == 3  # trial 2 was lower, but was stopped on the way and has no model
    assert best(TRIALS, "eval_loss", "max") == TRIALS[0]
    assert best(TRIALS[3:4], "eval_loss", "min") is None
    assert [one.number for one in finalists(book, tune)] == [3, 5]


def test_a_branch_of_which_no_trial_went_to_its_end_is_answered_by_the_best_that_went_furthest(
    tune: TuneSettings, book: Book
) -> None:
    book.trials += [
        trial(7, "stopped", 1.0, branch="galore"),
        trial(8, "stopped", 3.0, 2.7, branch="galore"),
        trial(9, "cut", 3.0, 2.6, branch="galore"),
        trial(10, "failed", 0.1, 0.1, branch="galore"),
        trial(11, "infeasible", branch="ratio"),
    ]
    assert [one.number for one in best_of_branches(book, tune)] == [3, 5, 9]
    assert [one.number for one in finalists(book, tune)] == [3, 5]


def test_the_front_has_every_trial_that_none_beats() -> None:
    assert [one.number for one in front(TRIALS, {"eval_loss": "min", "seconds": "min"})] == [3, 5]


def test_a_trial_is_numbered_and_found(book: Book) -> None:
    made = book.add(Point(0, {"lora_rank": 9}, "abc"), "lora", "lora", 2, 20)
    assert (made.number, made.name) == (7, "trial_0007_abc")
    assert book.named("trial_0007_abc") is made
    assert book.twin(Point(0, {}, "abc")) is made
    assert [one.number for one in book.open_trials] == [6, 7]


def test_trials_as_columns(tune: TuneSettings, book: Book) -> None:
    table = trials_columns(book, tune)
    assert table.num_rows == 6
    assert table["sampled.lora_rank"].type == pa.int64()
    assert table["sampled.learning_rate"].to_pylist() == [None, None, None, None, 1e-4, None]
    assert table["eval_loss"].to_pylist() == [2.5, 1.0, 2.2, None, 2.4, 2.6]
    assert table["report_values"].to_pylist()[0] == [3.0, 2.5]
    assert table["error"].to_pylist()[3] == "step 3: odd"


def test_what_was_found_so_far_counts_whole_trials(tmp_path: Path) -> None:
    assert best_so_far(TRIALS, "eval_loss", "min") == ([1, 3, 5], [2.5, 2.2, 2.2])
    best_so_far_plot(TRIALS, "eval_loss", "min", tmp_path / "best.png")
    trials_plot(TRIALS, "eval_loss", tmp_path / "trials.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("best.png", "trials.png"))


def shown(table: object) -> str:
    console = Console(width=160, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_tables_name_winners_errors_and_where_trials_are(tune: TuneSettings, book: Book) -> None:
    text = shown(result_table(book, tune))
    first, second = (line for line in text.splitlines() if "best" in line)
    assert "2.2000" in first
    assert "finished, best of its branch" in second
    assert "failed: step 3: odd" in text
    live = shown(trials_table(book, {TRIALS[5].name: Progress(14, 20, 2.71)}, "eval_loss", 8))
    assert "5 of 8 trials have ended" in live
    assert "14/20" in live
    assert "2.7100" in live


def test_lines_tell_every_change_once(book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    lines = TrialLines(Console(width=200), "eval_loss")
    lines.update(book, {})
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6
    assert told[0] == "trial 1 finished (lora; lora_rank: 4; 1 worker(s))  step 20/20  eval_loss 2.5000"
    lines.update(book, {})
    assert capsys.readouterr().out == ""


def test_time_to_go(book: Book) -> None:
    book.seconds = 50.0
    assert round(remaining(book, 7) or 0) in (20, 21)  # ten seconds a trial
    book.trials = []
    assert remaining(book, 7) is None


def test_the_book_is_plain_json(book: Book, tmp_path: Path) -> None:
    book.save()
    assert json.loads((tmp_path / "trials.json").read_text())["trials"][0]["values"] == {"lora_rank": 4}
