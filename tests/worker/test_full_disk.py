"""A worker whose disk takes no more: a limit on the size of its files, set on the living process, stands for it."""

from __future__ import annotations

import resource

import pytest
from tests.worker.under_ray import SAVE_STEPS, UPDATES, Watching, World

from tunefleet.checkpoints import newest_complete, step_of
from tunefleet.errors import RunFailed
from tunefleet.storage import place
from tunefleet.worker.events import Event, Stepped

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

_MOST_BYTES = 100_000
"""More than a line of metrics, less than a checkpoint."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "galore"])
def test_a_full_disk_ends_the_run_with_a_sentence_and_harms_no_checkpoint(world: World, method: str) -> None:
    world.run_twin(method, 1)
    recipe = world.recipe("full_disk", method, 1)
    limited: list[int] = []

    def react(event: Event) -> None:
        if isinstance(event, Stepped) and event.step.step > SAVE_STEPS and not limited:
            limited.append(world.attempts("full_disk")[-1]["pid"])
            resource.prlimit(limited[0], resource.RLIMIT_FSIZE, (_MOST_BYTES, resource.RLIM_INFINITY))

    with pytest.raises(RunFailed) as caught:
        world.run(recipe, Watching(react))
    said = str(caught.value)
    assert said.startswith(f"The run failed at step {2 * SAVE_STEPS}: The worker's disk takes no more (")
    assert "\n" not in said
    assert len(world.attempts("full_disk")) == 1
    folder = world.folder / "runs" / "full_disk"
    newest, notices = newest_complete(place(folder / "checkpoints"), hashes=True)
    assert newest is not None
    assert (step_of(newest), notices) == (SAVE_STEPS, [])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [newest.name]
    assert not [path for path in folder.rglob("*") if "tmp-" in path.name or path.name.startswith("tunefleet-")]

    assert world.run(recipe).exit_code == 0  # there is room again
    assert world.attempts("full_disk")[-1]["executed_steps"] == UPDATES - SAVE_STEPS
    assert world.traces("full_disk") == world.traces("twin")
