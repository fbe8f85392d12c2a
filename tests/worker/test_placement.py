"""What Ray reserves for a run, read back from Ray while the run is alive."""

from __future__ import annotations

from typing import Any

import pytest
from ray.util import placement_group_table
from tests.worker.under_ray import Watching, World

from tunefleet.worker.events import Event, Stepped

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


class Surveyor:
    """Keeps Ray's table of live placement groups as it is at the first step of a run."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] | None = None

    def __call__(self, event: Event) -> None:
        if self.groups is None and isinstance(event, Stepped):
            self.groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]


@pytest.mark.parametrize(("method", "workers"), [("badam_adjacent", 1), ("lora_dropout", 2)])
def test_a_placement_group_has_one_bundle_for_each_worker(world: World, method: str, workers: int) -> None:
    """Ratio mode of BAdam gets exactly one; two workers of LoRA show that the table would tell of more."""
    surveyor = Surveyor()
    outcome = world.run(world.recipe("placed", method, workers, max_steps=4, save_strategy="no"), Watching(surveyor))
    assert outcome.exit_code == 0
    assert surveyor.groups is not None
    (group,) = surveyor.groups
    assert list(group["bundles"].values()) == [{"CPU": 1.0}] * workers
    assert world.attempts("placed")[-1]["executed_steps"] == 4
