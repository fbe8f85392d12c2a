"""What Ray reserves for a run, read back from Ray while the run is alive."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from tests.worker.under_ray import Watching, World

from tunefleet.errors import RunFailed
from tunefleet.launch.cluster import joined_shape, ray_session
from tunefleet.launch.draft import draft
from tunefleet.launch.waiting import Waiting
from tunefleet.worker.events import Event, Noticed, Stepped

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


def test_a_wait_for_processes_is_not_told_as_a_want_of_room(world: World) -> None:
    """On a busy machine a process takes longer to start than a wait may last without a word."""
    recipe = world.recipe("slow_start", "full", 1, ray_start_timeout=2)
    with ray_session(recipe.ray):
        plan = draft(recipe, joined_shape(recipe.ray), world.folder)
        said: list[str] = []
        for bundle in ({"CPU": 1}, {"CPU": 0.5}):
            group = placement_group([bundle])
            ray.get(group.ready())
            waiting = Waiting(plan)
            time.sleep(1.1)
            said += [event.text for event in waiting.heard([]) if isinstance(event, Noticed)]
            time.sleep(1)
            with pytest.raises(RunFailed, match=re.escape(said[-1].split(".")[0])):
                waiting.look()
            remove_placement_group(group)
    assert said[0].startswith("The workers have their places (1 CPU each), but their processes have not started yet.")
    assert said[1].startswith("The cluster has no room for the workers"), "that group is not of this size"
