"""The table of what was killed when and what it cost, at the end of `make chaos`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chaos.blows import Damage
from tests.cluster import RayNodes, ray_nodes
from tests.s3_server import Server, s3_server

sys.path.append(str(Path(__file__).resolve().parents[2]))

_TOLD: list[Damage] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-seed", type=int, default=0, help="draws the steps and nodes that are hit")


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chaos-seed", default=0))


@pytest.fixture(scope="session")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(dashboard=True) as started:
        yield started


@pytest.fixture(scope="session")
def bucket() -> Iterator[Server]:
    with s3_server() as running:
        running.bucket("chaos")
        yield running


@pytest.fixture(scope="session")
def damages() -> list[Damage]:
    """What every run has cost so far."""
    return _TOLD


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _TOLD:
        return
    terminalreporter.section("what was hit, when, and what it cost")
    widths = [max(len(row[column]) for row in [Damage.TITLES, *(one.row() for one in _TOLD)]) for column in range(6)]
    for row in [Damage.TITLES, *(one.row() for one in _TOLD)]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())
