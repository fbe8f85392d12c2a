"""Whole runs under Ray on as many GPUs as there are: NCCL, a kill, and the way on from the newest checkpoint."""

from __future__ import annotations

import pytest
import torch
from tests.worker.test_resume import Killer
from tests.worker.under_ray import METHODS, SAVE_STEPS, UPDATES, World

from tunefleet.artifacts.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

ONE_EACH = {"resources_per_worker": {"CPU": 1, "GPU": 1}}
CELLS = [(method, 1) for method in METHODS] + [("full", 2), ("lora_dropout", 2), ("galore", 2), ("badam_ascending", 2)]


@pytest.mark.parametrize(("method", "workers"), CELLS)
def test_a_killed_worker_goes_on_from_its_checkpoint(world: World, method: str, workers: int) -> None:
    if torch.cuda.device_count() < workers:
        pytest.skip(f"there are fewer than {workers} GPUs")
    with Killer(world, "killed", SAVE_STEPS + 3) as killer:
        outcome = world.run(world.recipe("killed", method, workers, **ONE_EACH))
    assert killer.killed is not None
    assert outcome.exit_code == 0
    assert outcome.plan.workers.device == "cuda"
    last = world.attempts("killed")[-1]
    assert last["start_step"] in range(SAVE_STEPS, UPDATES)
    lines = read_metrics(world.record("killed") / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, UPDATES + 1))
    assert (lines[-1]["loss"] or 0) < 0.95 * (lines[0]["loss"] or 0)
