"""A command's lines carry the time at which they came, and a failed command says so."""

import sys
from pathlib import Path

import pytest
from beside.commands import run_timed

TWO_LINES = "import time; print('step 1'); time.sleep(0.3); print('step 2'); print('other')"


def test_lines_carry_their_arrival(tmp_path: Path) -> None:
    timed = run_timed([sys.executable, "-c", TWO_LINES], tmp_path / "log.txt", {})
    first, second = timed.arrivals("step")
    assert second - first >= 0.25
    assert timed.wall_seconds >= second
    assert (tmp_path / "log.txt").read_text() == "step 1\nstep 2\nother"


def test_both_sides_get_the_same_thread_count_and_no_hub(tmp_path: Path) -> None:
    shown = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'], os.environ['EXTRA'])"
    timed = run_timed([sys.executable, "-c", shown], tmp_path / "log.txt", {"EXTRA": "yes"})
    assert timed.lines[0][1] == "1 1 yes"


def test_a_failed_command_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such recipe") as refused:
        run_timed([sys.executable, "-c", "raise SystemExit('no such recipe')"], tmp_path / "log.txt", {})
    assert "ended with code 1" in str(refused.value)
