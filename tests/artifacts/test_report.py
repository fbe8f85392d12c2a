"""The loss plot and the summary table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from tunefleet.artifacts.report import EVALUATED, SMOOTH, loss_plot, smoothed, summary_table


def write(file: Path, *lines: dict[str, float | None]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def has_colour(image: Path, colour: str) -> bool:
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    pixels = imread(image)[..., :3]
    return bool((abs(pixels - [red, green, blue]).max(axis=-1) < 0.01).sum() > 50)


@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_plot_shows_both_losses(tmp_path: Path, count: int) -> None:
    lines: list[dict[str, float | None]] = [
        {"step": step, "loss": 2 + 3 * math.exp(-step / 15) + 0.3 * math.sin(step * 2.3)}
        for step in range(1, count + 1)
    ]
    lines += [{"step": count // 2, "eval_loss": 3.0}, {"step": count, "eval_loss": 2.4}]
    assert loss_plot(write(tmp_path / "metrics.jsonl", *lines), tmp_path / "loss.png")
    assert has_colour(tmp_path / "loss.png", EVALUATED)
    assert count == 1 or has_colour(tmp_path / "loss.png", SMOOTH)


def test_no_plot_without_a_loss(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": None})
    assert not loss_plot(metrics, tmp_path / "loss.png")
    assert not loss_plot(tmp_path / "missing.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_a_constant_and_calms_noise() -> None:
    assert smoothed([2.0] * 40) == pytest.approx([2.0] * 40)
    noisy = [2.0 + (-1) ** index for index in range(200)]
    assert max(abs(value - 2.0) for value in smoothed(noisy)[50:]) < 0.1


def test_the_table_has_a_row_for_what_is_known() -> None:
    console = Console(width=80, record=True)
    console.print(
        summary_table({"step": 1200, "loss": 1.23456, "eval_loss": None, "seconds": 3723.0, "fingerprints": {}})
    )
    text = console.export_text()
    assert "1,200" in text
    assert "1.2346" in text
    assert "1 h 02 min" in text
    assert "evaluation" not in text
