"""Rates are of real tokens, and start-up is in one of them only."""

from beside.measure import Run, intervals, markdown_table, spread


def run(step_seconds: tuple[float, ...], step_tokens: tuple[float, ...]) -> Run:
    return Run(20.0, step_seconds, step_tokens, losses=(9.0,), grad_norms=(1.0,))


def test_the_steady_rate_leaves_out_the_first_three_steps() -> None:
    slow_start = run((50.0, 50.0, 50.0, 2.0, 3.0), (1.0, 1.0, 1.0, 100.0, 400.0))
    assert slow_start.steady_rate == 100.0


def test_the_steady_rate_needs_no_time_of_the_first_step() -> None:
    whole = run((9.0, 9.0, 9.0, 2.0, 3.0), (1.0, 1.0, 1.0, 100.0, 400.0))
    first_unknown = run((9.0, 9.0, 2.0, 3.0), (1.0, 1.0, 1.0, 100.0, 400.0))
    assert first_unknown.steady_rate == whole.steady_rate


def test_the_whole_rate_counts_every_token_and_every_second() -> None:
    assert run((1.0, 1.0), (300.0, 100.0)).whole_rate == 20.0


def test_intervals_are_the_time_between_lines() -> None:
    assert intervals((1.0, 1.5, 4.0)) == (0.5, 2.5)


def test_spread_names_median_and_bounds() -> None:
    assert str(spread([3.0, 1.0, 20.0])) == "3 (1-20)"


def test_the_table_has_one_line_for_each_row_and_equal_widths() -> None:
    lines = markdown_table(("a", "long name"), [("something", "b")]).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
