"""ZeRO under Ray Train: two workers train one model in parts, and what they leave is an ordinary model."""

from __future__ import annotations

import math

import pytest
from tests.worker.under_ray import World
from transformers import AutoModelForCausalLM

from tunefleet.artifacts.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_two_ray_workers_train_a_model_in_parts(world: World) -> None:
    shared = {"deepspeed": "zero3", "max_steps": 3, "save_steps": 2}
    assert world.run(world.recipe("parts", "full", 2, **shared)).exit_code == 0
    lines = read_metrics(world.record("parts") / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    names = {file.name for file in (world.folder / "runs" / "parts" / "checkpoints" / "step_00000002").iterdir()}
    assert names >= {f"{what}-{rank}-of-2.{end}" for rank in (1, 2) for what, end in PARTS}
    AutoModelForCausalLM.from_pretrained(world.folder / "parts")


PARTS = (("weights", "safetensors"), ("optimizer", "pt"))
