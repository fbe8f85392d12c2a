"""What a person sees of each event, on a terminal and in a log."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from tunefleet.artifacts.metrics import Line
from tunefleet.launch.display import LineDisplay, LiveDisplay, open_display
from tunefleet.training.step import Pace, Step
from tunefleet.worker.events import Evaluated, Event, Logged, Noticed, Saved, Started, Stepped


def step(number: int, mfu: float | None = None) -> Step:
    return Step(
        step=number,
        epoch=0.5,
        loss=1.23456,
        learning_rate=1e-3,
        grad_norm=0.7,
        tokens=100,
        target_tokens=50,
        seconds=0.1,
        tokens_per_second=1234.5,
        mfu=mfu,
        stopped=False,
        pace=Pace(100, 0.01, 0.05),
    )


def line(number: int, loss: float | None = 1.23456, mfu: float | None = None) -> Line:
    return {"step": number, "loss": loss, "learning_rate": 1e-3, "tokens_per_second": 1234.5, "mfu": mfu}


def in_a_log(*events: Event, width: int = 40) -> list[str]:
    file = io.StringIO()
    with LineDisplay(Console(file=file, width=width)) as display:
        for event in events:
            display.show(event)
    first, *lines = file.getvalue().splitlines()
    assert first == "starting the workers"
    return lines


def on_a_terminal(events: Sequence[Event], width: int = 120) -> list[str]:
    """Everything that was written, drawn-over lines included, without colours."""
    file = io.StringIO()
    with LiveDisplay(Console(file=file, force_terminal=True, width=width)) as display:
        for event in events:
            display.show(event)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_the_display_fits_where_the_output_goes() -> None:
    assert isinstance(open_display(Console(file=io.StringIO(), force_terminal=True)), LiveDisplay)
    assert isinstance(open_display(Console(file=io.StringIO())), LineDisplay)


# ---- plain lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (Started(0, 20, 1), "1 worker(s) ready; step 0 of 20"),
        (Started(10, 20, 2), "2 worker(s) ready; step 10 of 20"),
        (Evaluated(8, 2.34567), "step 8: eval_loss 2.3457"),
        (Saved(8), "step 8: checkpoint saved"),
        (Noticed("look [here] and [/there]"), "note: look [here] and [/there]"),
    ],
)
def test_each_event_is_one_line_in_a_log(event: Event, shown: str) -> None:
    assert in_a_log(event) == [shown]


@pytest.mark.parametrize(
    ("logged", "shown"),
    [
        (line(4), "step 4/20  loss 1.2346  lr 1.00e-03  1,234 tok/s"),
        (line(4, mfu=0.314), "step 4/20  loss 1.2346  lr 1.00e-03  1,234 tok/s  mfu 31%"),
        (line(4, loss=None), "step 4/20  loss n/a  lr 1.00e-03  1,234 tok/s"),
    ],
)
def test_a_line_of_the_metrics_is_a_line_of_the_log(logged: Line, shown: str) -> None:
    assert in_a_log(Started(0, 20, 1), Logged(logged))[1:] == [shown]


def with_workers(data_wait_seconds: float) -> Line:
    workers = {
        "step_seconds": [2.0, 2.0],
        "data_wait_seconds": [0.0, data_wait_seconds],
        "memory_peak_bytes": [2.0**29, 3.0 * 2**30],
    }
    return line(4) | {"workers": workers}


def test_of_the_workers_it_says_the_memory_and_long_waits_for_data() -> None:
    assert in_a_log(Logged(with_workers(0.1)))[0].endswith("1,234 tok/s  3.0 GiB")
    assert in_a_log(Logged(with_workers(0.6)))[0].endswith("1,234 tok/s  3.0 GiB  waits for data 30%")
    assert "3.0 GiB" in on_a_terminal([Started(0, 20, 2), Logged(with_workers(0.1)), Stepped(step(5))])[-1]


def test_updates_between_two_lines_of_the_metrics_are_silent_in_a_log() -> None:
    assert in_a_log(Stepped(step(1)), Stepped(step(2))) == []


def test_a_log_breaks_no_line_and_has_no_colours() -> None:
    said = "a long word " * 20
    assert in_a_log(Noticed(said), width=30) == [f"note: {said}"]


# ---- before the start ----------------------------------------------------------------------------------------------


def prepared(display: LineDisplay | LiveDisplay) -> None:
    with display.preparing() as stages:
        for done in (0, 5, 10):
            stages("tokenise training", done, 10)


def test_a_log_has_a_line_for_each_stage_that_is_done() -> None:
    file = io.StringIO()
    prepared(LineDisplay(Console(file=file)))
    assert file.getvalue() == "tokenise training: 10 done\n"


def test_a_terminal_has_a_bar_for_each_stage() -> None:
    file = io.StringIO()
    prepared(LiveDisplay(Console(file=file, force_terminal=True, width=100)))
    assert "tokenise training" in file.getvalue()
    assert "10/10" in file.getvalue()


# ---- one progress line ----------------------------------------------------------------------------------------------


def test_before_the_workers_stand_ready_a_terminal_says_so() -> None:
    assert on_a_terminal([])[-1].startswith("starting the workers")


@pytest.mark.parametrize(("workers", "shown"), [(1, "training (1 worker)"), (2, "training (2 workers)")])
def test_a_continued_run_starts_where_it_was(workers: int, shown: str) -> None:
    last = on_a_terminal([Started(10, 20, workers)])[-1]
    assert last.startswith(shown)
    assert "10/20" in last


def test_the_newest_update_stands_in_the_progress_line() -> None:
    last = on_a_terminal([Started(0, 20, 1), Stepped(step(3)), Stepped(step(4))])[-1]
    assert "4/20" in last
    assert "loss 1.2346  lr 1.00e-03  1,234 tok/s" in last
    assert "mfu" not in last
    assert "mfu 31%" in on_a_terminal([Started(0, 20, 1), Stepped(step(4, mfu=0.314))])[-1]


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (Evaluated(8, 2.34567), "step 8: eval_loss 2.3457"),
        (Saved(8), "step 8: checkpoint saved"),
        (Noticed("look here"), "note look here"),
    ],
)
def test_other_events_scroll_above_the_progress_line(event: Event, shown: str) -> None:
    lines = on_a_terminal([Started(0, 20, 1), event])
    assert lines.count(shown) == 1
    assert lines[-1].startswith("training")


def test_a_line_of_the_metrics_changes_nothing_on_a_terminal() -> None:
    assert not any("1.2346" in text for text in on_a_terminal([Started(0, 20, 1), Logged(line(4))]))


def test_the_terminal_is_given_back_after_an_error() -> None:
    file = io.StringIO()
    with pytest.raises(ValueError, match="odd"), LiveDisplay(Console(file=file, force_terminal=True)):
        raise ValueError("odd")
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l"), "the cursor is shown again"
