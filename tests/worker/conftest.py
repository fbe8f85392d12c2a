"""The world of runs under Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.worker.under_ray import World


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> dict[str, object]:
    """The keys that every run of this folder has: a model, data, and places for what it leaves."""
    return {
        "model_name_or_path": str(tiny_model),
        "dataset": "quickstart_train",
        "dataset_dir": str(quickstart_world / "data"),
        "cache_dir": str(quickstart_world / "cache"),
        "cutoff_len": 64,
        "output_dir": "out",
        "ray_storage_path": str(tmp_path / "runs"),
        "resources_per_worker": {"CPU": 1},
        "report_to": "none",
        "seed": 1,
    }


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, quickstart_world: Path, ray_address: str) -> World:
    return World(tmp_path, tiny_model, quickstart_world, ray_address)
