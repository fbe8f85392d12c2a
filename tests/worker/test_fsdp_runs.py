"""A model shared out over two Ray workers: trained, saved, exported, and gone on from."""

from __future__ import annotations

import json

import pytest
import torch
from tests.worker.alone import run_alone
from tests.worker.under_ray import World
from transformers import AutoModelForCausalLM

from tunefleet.artifacts.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_two_workers_with_half_of_the_model_each(world: World) -> None:
    """The numbers are those of one plain worker; each wrote its own part of the checkpoint."""
    short = {"max_steps": 4, "save_steps": 2, "bf16": False, "adam_epsilon": 1e-6}
    recipe = world.recipe("shared", "full_fsdp2", 2, **short)
    assert world.run(recipe).exit_code == 0
    finished = run_alone(world.recipe("plain", "full", 1, **short), world.folder)
    ours, theirs = (read_metrics(world.record(name) / "metrics.jsonl") for name in ("shared", "plain"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    checkpoint = world.folder / "runs" / "shared" / "checkpoints" / "step_00000004"
    parts = [checkpoint / f"weights-{rank:05d}-of-00002.safetensors" for rank in (0, 1)]
    sizes = [part.stat().st_size for part in parts]
    assert max(sizes) <= 0.6 * sum(sizes)
    plan = [json.loads((world.record(name) / "plan.json").read_text())["model"] for name in ("shared", "plain")]
    assert plan[0]["weight_bytes"] == plan[1]["weight_bytes"] // 2
    models = [
        AutoModelForCausalLM.from_pretrained(world.folder / "runs" / name / "model") for name in ("shared", "plain")
    ]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        shared, plain = (model(ids).logits for model in models)
    assert float((shared - plain).abs().max()) <= 1e-4 * float(plain.max() - plain.min())
    assert not finished.ending["stopped"]
