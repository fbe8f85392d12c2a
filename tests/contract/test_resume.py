"""Interrupted at any step and resumed: bit-identical, and no field of the checkpoint is there for nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.contract.variants import CELLS, VARIANTS
from tests.training.tiny import FP32, MIXED, PURE, Run, start

from tunefleet.errors import Refused
from tunefleet.training.checkpoint import fingerprints, load, load_initial, save
from tunefleet.training.progress import Progress
from tunefleet_strategies.contract import Precision

UPDATES = 4


@dataclass(frozen=True)
class Ending:
    losses: tuple[float, ...]
    hashes: dict[str, str]


def begin(variant: str, architecture: str, precision: Precision, folder: Path | None = None) -> Run:
    initial = None if folder is None else load_initial(folder)
    cut = 4 if VARIANTS[variant].traits().accumulation else 6
    return start(
        VARIANTS[variant],
        architecture,
        updates=UPDATES,
        global_batch=6,
        micro_batch=cut,
        precision=precision,
        initial=initial,
    )


def uninterrupted(variant: str, architecture: str, precision: Precision, checkpoints: Path) -> Ending:
    """Train to the end and keep a checkpoint of every step, the beginning included."""
    run = begin(variant, architecture, precision)
    keep(run, checkpoints, 0)
    losses = []
    for step in run.steps():
        losses.append(step.loss)
        keep(run, checkpoints, step.step)
    return Ending(tuple(losses), fingerprints(run.state))


def keep(run: Run, checkpoints: Path, step: int) -> None:
    folder = checkpoints / str(step)
    folder.mkdir()
    save(folder, run.state, Progress(step=step))


def resumed(variant: str, architecture: str, precision: Precision, folder: Path) -> Ending:
    """What a new process does with a checkpoint. Its own losses only."""
    run = begin(variant, architecture, precision, folder)
    loaded = load(folder, run.state)
    assert loaded.notices == ()
    losses = tuple(step.loss for step in run.steps(first=loaded.progress.step))
    return Ending(losses, fingerprints(run.state))


@pytest.mark.parametrize(("variant", "architecture"), CELLS)
def test_a_run_interrupted_at_any_step_is_bit_identical(variant: str, architecture: str, tmp_path: Path) -> None:
    twin = uninterrupted(variant, architecture, FP32, tmp_path)
    for step in range(1, UPDATES):
        again = resumed(variant, architecture, FP32, tmp_path / str(step))
        assert again.losses == twin.losses[step:], step
        assert again.hashes == twin.hashes, step


@pytest.mark.parametrize("precision", [MIXED, PURE], ids=["bf16", "pure_bf16"])
@pytest.mark.parametrize("variant", ["full", "lora_dropout", "pissa", "galore", "galore_layerwise"])
def test_in_bf16_too(variant: str, precision: Precision, tmp_path: Path) -> None:
    twin = uninterrupted(variant, "llama", precision, tmp_path)
    assert resumed(variant, "llama", precision, tmp_path / "2") == Ending(twin.losses[2:], twin.hashes)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("lora_dropout", "weights.safetensors"),
        ("lora_dropout", "optimizer.pt"),
        ("lora_dropout", "random.safetensors"),
        ("lora_dropout", "state.json"),
        ("pissa", "initial.safetensors"),
    ],
)
def test_a_field_left_out_changes_the_result(variant: str, name: str, tmp_path: Path) -> None:
    """The comparison above can go red: with any one file as it was at the run's beginning, it does."""
    twin = uninterrupted(variant, "llama", FP32, tmp_path)
    folder = tmp_path / "2"
    if name == "initial.safetensors":
        other = tmp_path / "other"
        other.mkdir()
        run = begin(variant, "llama", FP32)
        values = {key: -value for key, value in run.state.initial.items()}
        object.__setattr__(run.state, "initial", {key: value * 2.0 for key, value in values.items()})
        save(other, run.state, Progress())
        (folder / name).write_bytes((other / name).read_bytes())
    else:
        (folder / name).write_bytes((tmp_path / "0" / name).read_bytes())
    if name == "state.json":  # the step is in there: the run starts over and executes all its updates again
        assert json.loads((folder / name).read_text())["progress"]["step"] == 0
    again = resumed(variant, "llama", FP32, folder)
    assert again.hashes != twin.hashes


FIELDS = [
    *(("galore", name) for name in ("step", "exp_avg", "exp_avg_sq", "left", "right")),
    *(("galore_layerwise", name) for name in ("step", "exp_avg", "exp_avg_sq", "left", "right")),
    *(("badam_layer", name) for name in ("updates", "exp_avg", "exp_avg_sq", "master")),
    *(("badam_ratio", name) for name in ("updates", "exp_avg", "exp_avg_sq", "master")),
]


@pytest.mark.parametrize(("variant", "name"), FIELDS)
def test_no_field_of_an_optimizers_state_is_there_for_nothing(variant: str, name: str, tmp_path: Path) -> None:
    """With any one of them as if it had been left out (a zero, or what the weights say), the result is another one."""
    twin = uninterrupted(variant, "llama", PURE, tmp_path)
    # Within a visit of BAdam, between two refreshes of GaLore, and not in warm-up, where nothing moves.
    folder = tmp_path / ("3" if variant.startswith("badam") else "2")
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    touched = 0
    if name == "updates":
        state["updates"], touched = 0, 1
    for entry in state["state"].values():
        if name == "step":
            entry["step"], touched = 0, touched + 1
        elif name == "master":
            entry["master"], touched = entry["master"].bfloat16().float(), touched + 1
        elif name in entry:
            entry[name], touched = torch.zeros_like(entry[name]), touched + 1
    assert touched
    torch.save(state, folder / "optimizer.pt")
    assert resumed(variant, "llama", PURE, folder).hashes != twin.hashes


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.pt", "random.safetensors", "state.json", "initial.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_missing_or_damaged_file_is_one_sentence(name: str, damage: str, tmp_path: Path) -> None:
    run = begin("pissa", "llama", FP32)
    list(run.steps(last=1))
    keep(run, tmp_path, 1)
    file = tmp_path / "1" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(Refused, match=name) as refusal:
        resumed("pissa", "llama", FP32, tmp_path / "1")
    assert str(refusal.value).count("\n") == 0


def test_a_checkpoint_of_another_engine_is_named_as_that(tmp_path: Path) -> None:
    run = begin("full", "llama", FP32)
    list(run.steps(last=1))
    keep(run, tmp_path, 1)
    file = tmp_path / "1" / "state.json"
    file.write_text(file.read_text().replace("plain data parallelism", "sharding: fsdp2"))
    with pytest.raises(Refused, match="was written under sharding: fsdp2, and its files cannot be read under plain"):
        resumed("full", "llama", FP32, tmp_path / "1")
