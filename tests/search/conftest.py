"""What tests of searches share: a world of runs under Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.worker.under_ray import World


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, quickstart_world: Path, ray_address: str) -> World:
    return World(tmp_path, tiny_model, quickstart_world, ray_address)
