"""The ranks of a group in tests: one that fails ends the others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.group import run_group


def test_a_rank_that_fails_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"exit codes \[None, 2\](?s:.*)rank 1:\nusage"):
        run_group([["http.server", "--bind", "127.0.0.1", "0"], ["json.tool", str(tmp_path / "no such")]], seconds=60)
    assert time.monotonic() - began < 30


def test_ranks_that_hang_say_where() -> None:
    with pytest.raises(AssertionError, match=r"longer than 5 s(?s:.*)rank 0:\nFatal Python error(?s:.*)socketserver"):
        run_group([["http.server", "--bind", "127.0.0.1", "0"]] * 2, seconds=5)


def test_ranks_that_end_well_are_waited_for() -> None:
    run_group([["calendar"], ["calendar"]], seconds=60)
