"""What Ray reserves for a run, read back from Ray while the run is alive."""

from __future__ import annotations

from typing import Any

import pytest
from ray.util import placement_group_table
from tests.worker.under_ray import Watching, World

from tunefleet.worker.events import Event, Stepped

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LONG_ENOUGH = 200
"""Updates that last for seconds, so that the run is still alive when the driver hears of its first one."""


class Surveyor:
    """Looks into Ray's table of live placement groups during a run, until it shows exactly one.

    More than one may be there for a moment: Ray takes its time to remove the group of a run that has just ended.
    """

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped) and len(self.groups) != 1:
            self.groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]


@pytest.mark.parametrize(("method", "workers"), [("badam_adjacent", 1), ("lora_dropout", 2)])
def test_a_placement_group_has_one_bundle_for_each_worker(world: World, method: str, workers: int) -> None:
    """Ratio mode of BAdam gets exactly one; two workers of LoRA show that the table would tell of more."""
    surveyor = Surveyor()
    outcome = world.run(
        world.recipe("placed", method, workers, max_steps=LONG_ENOUGH, save_strategy="no"), Watching(surveyor)
    )
    assert outcome.exit_code == 0
    (group,) = surveyor.groups
    assert list(group["bundles"].values()) == [{"CPU": 1.0}] * workers
    assert world.attempts("placed")[-1]["executed_steps"] == LONG_ENOUGH
