"""What the quickstart reads out of a run's metrics."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from quickstart import Result, read_result, result_table
from rich.console import Console

METRICS = [
    {"step": 0, "eval_loss": 6.0},
    {"step": 10, "loss": 5.5, "tokens_per_second": 900.0},
    {"step": 20, "loss": 5.0, "tokens_per_second": 1000.0},
    {"step": 20, "eval_loss": 5.2},
    {"step": 30, "loss": 4.6, "tokens_per_second": 1400.0},
    {"step": 40, "loss": 4.5, "tokens_per_second": 1000.0},
    {"step": 40, "eval_loss": 5.1},
]


def test_result_is_read_from_first_and_last_lines() -> None:
    result = read_result(METRICS, vocabulary=4096)
    assert dataclasses.replace(result, train_after=4.7) == Result(5.5, 4.7, 6.0, 5.1, 1000.0, 4096)
    assert result.train_after == pytest.approx(4.7)
    assert result.chance == math.log(4096)


@pytest.mark.parametrize("kept", ["loss", "eval_loss"])
def test_metrics_without_training_or_evaluation_are_refused(kept: str) -> None:
    with pytest.raises(ValueError, match="lacks lines"):
        read_result([line for line in METRICS if kept in line], vocabulary=4096)


def test_table_shows_the_ratio() -> None:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as captured:
        console.print(result_table(read_result(METRICS, vocabulary=4096)))
    assert "0.85" in captured.get()
    assert "8.318" in captured.get()
