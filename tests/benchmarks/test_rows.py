"""The rows are the same everywhere and as long as instruction data is."""

import statistics

from beside.rows import make_rows


def test_the_same_seed_gives_the_same_rows() -> None:
    assert make_rows(20, 42) == make_rows(20, 42)
    assert make_rows(20, 42) != make_rows(20, 43)


def test_a_longer_list_begins_with_the_shorter() -> None:
    assert make_rows(40, 42)[:20] == make_rows(20, 42)


def test_answers_have_a_long_tail() -> None:
    words = [len(row.output.split()) for row in make_rows(1000, 42)]
    assert statistics.mean(words) > 1.4 * statistics.median(words)
    assert max(words) > 10 * statistics.median(words)


def test_about_four_rows_of_ten_have_an_input() -> None:
    with_input = sum(bool(row.input) for row in make_rows(1000, 42))
    assert 350 < with_input < 450
