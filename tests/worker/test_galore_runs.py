"""Whole runs with GaLore, in this process: the documented example, what the record says, what upstream leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.worker.alone import Finished, run_alone

from tunefleet.artifacts.metrics import Line, read_metrics
from tunefleet.errors import Refused
from tunefleet.recipe.read import read_flat

DOCUMENTED: dict[str, object] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "use_galore": True,
    "galore_layerwise": True,
    "galore_target": "mlp,self_attn",
    "galore_rank": 128,
    "galore_scale": 2.0,
    "pure_bf16": True,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
}


@pytest.fixture
def keys(job: dict[str, object]) -> dict[str, object]:
    return job | {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 5}


def lines(finished: Finished) -> list[Line]:
    return read_metrics(Path(finished.folder.root.uri) / "record" / "metrics.jsonl")


def checkpoint(finished: Finished, step: int) -> Path:
    return Path(finished.folder.root.uri) / "checkpoints" / f"step_{step:08d}"


def test_the_documented_example_runs_unchanged_and_learns(keys: dict[str, object], tmp_path: Path) -> None:
    finished = run_alone(read_flat(keys | DOCUMENTED | {"max_steps": 40, "save_steps": 40}), tmp_path)
    losses = [line["loss"] or 0.0 for line in lines(finished)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(0.0 < (line["weights_changed"] or 0.0) <= 1.0 for line in lines(finished)[:-1])
    state = torch.load(checkpoint(finished, 40) / "optimizer.pt", weights_only=True)["state"]
    assert {entry["step"] for entry in state.values()} == {40}
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.float32}
    bases = [entry[side] for entry in state.values() for side in ("left", "right") if side in entry]
    assert len(bases) == 2 * 7
    assert {basis.dtype for basis in bases} == {torch.bfloat16}
    assert max(min(basis.shape) for basis in bases) == 64  # rank 128, cut to the smaller side


def test_weights_with_an_fp32_copy_have_no_such_figure(keys: dict[str, object], tmp_path: Path) -> None:
    more = {"finetuning_type": "full", "use_galore": True, "max_steps": 5, "bf16": False, "save_strategy": "no"}
    assert not any("weights_changed" in line for line in lines(run_alone(read_flat(keys | more), tmp_path)))


def test_the_state_of_the_upstream_optimizer_is_not_saved(keys: dict[str, object], tmp_path: Path) -> None:
    more = {"finetuning_type": "full", "use_galore": True, "optimizer_backend": "upstream", "bf16": False}
    recipe = read_flat(keys | more | {"max_steps": 10, "save_steps": 5, "galore_scale": 1.0})
    finished = run_alone(recipe, tmp_path)
    losses = [line["loss"] or 0.0 for line in lines(finished)]
    assert losses[-1] < losses[0]
    assert (checkpoint(finished, 10) / "weights.safetensors").is_file()
    assert not (checkpoint(finished, 10) / "optimizer.pt").exists()
    plan = json.loads((Path(finished.folder.root.uri) / "record" / "record.json").read_text())["plan"]
    assert not plan["resumable"]
    assert any("cannot be saved" in notice for notice in plan["notices"])


def test_two_workers_and_layerwise_are_refused_by_the_plan(keys: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"galore_layerwise.*ray_num_workers is 2"):
        run_alone(read_flat(keys | DOCUMENTED | {"max_steps": 5, "ray_num_workers": 2}), tmp_path)
