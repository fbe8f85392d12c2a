"""Every method on one GPU, without Ray: bf16, the same numbers as on a CPU, resume, and the loss scaler of fp16."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.contract.variants import VARIANTS
from tests.training.tiny import ARCHITECTURES, FP32, MIXED, MemoryRows, Run, start

from tunefleet.training.checkpoint import fingerprints, load, load_initial, save
from tunefleet.training.progress import Progress
from tunefleet_strategies.contract import Precision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

DEVICE = "cuda"
HALF = Precision(torch.float16, torch.float32, torch.float16)
SCALED = [name for name, variant in VARIANTS.items() if variant.name in ("full", "freeze", "lora")]
"""Methods whose optimizer is torch's own, which the loss scaler works with."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_in_bf16_and_leaves_the_frozen_alone(variant: str, architecture: str) -> None:
    run = start(
        VARIANTS[variant],
        architecture,
        updates=12,
        rows=MemoryRows(count=8),
        learning_rate=1e-2,
        precision=MIXED,
        device=DEVICE,
    )
    assert {parameter.device.type for parameter in run.model.parameters()} == {DEVICE}
    losses = [step.loss for step in run.steps()]
    assert min(losses[-3:]) < 0.9 * losses[0]
    for name, parameter in run.model.named_parameters():
        same = torch.equal(parameter, run.started[name])
        assert same or name in run.state.trained, f"{name} is frozen and moved"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "lora_dropout"])
def test_it_computes_what_a_cpu_computes(variant: str) -> None:
    """fp32 without TF32: the same sums in another order. Dropout is left out, whose draws differ.

    PiSSA's randomized SVD draws as well: its two bases agree as far as the power iterations have converged.
    """
    losses = []
    for device in ("cpu", DEVICE):
        run = start(VARIANTS[variant], "llama", updates=6, epsilon=1e-6, device=device)
        losses.append([step.loss for step in run.steps()])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3 if variant == "pissa" else 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_stands_where_it_was_saved(variant: str, tmp_path: Path) -> None:
    """What is loaded is what was saved, bit for bit; what follows agrees as far as GPU kernels repeat themselves."""
    twin = begin(variant, MIXED)
    following = []
    saved: dict[str, str] = {}
    for step in twin.steps():
        if step.step > 2:
            following.append(step.loss)
        if step.step == 2:
            save(tmp_path, twin.state, Progress(step=2))
            saved = fingerprints(twin.state)
    run = begin(variant, MIXED, tmp_path)
    assert load(tmp_path, run.state).progress.step == 2
    assert fingerprints(run.state) == saved
    losses = [step.loss for step in run.steps(first=2)]
    assert losses[0] == pytest.approx(following[0], rel=1e-5)
    assert losses == pytest.approx(following, rel=1e-2)


def begin(variant: str, precision: Precision, folder: Path | None = None) -> Run:
    initial = None if folder is None else load_initial(folder)
    return start(VARIANTS[variant], "llama", updates=4, precision=precision, initial=initial, device=DEVICE)


@pytest.mark.parametrize("variant", SCALED)
def test_fp16_skips_what_overflows_and_lowers_its_scale(variant: str, tmp_path: Path) -> None:
    run = start(
        VARIANTS[variant],
        "llama",
        updates=24,
        rows=MemoryRows(count=8),
        learning_rate=1e-2,
        precision=HALF,
        device=DEVICE,
    )
    too_high = 2.0**24  # a few halvings above what these gradients bear: 2^18 was seen to do
    run.engine.restore({**run.engine.state(), "scale": too_high})
    losses, skipped = [], 0
    before = fingerprints(run.state)["weights"]
    for step in run.steps():
        losses.append(step.loss)
        if not math.isfinite(step.grad_norm):  # inf, or nan where infinities met
            skipped += 1
            assert fingerprints(run.state)["weights"] == before, "a step that overflowed moved the weights"
        before = fingerprints(run.state)["weights"]
        if step.step == 20:
            save(tmp_path, run.state, Progress(step=20))
            scaler = run.engine.state()
    assert 0 < skipped < 24
    assert run.engine.state()["scale"] == too_high / 2**skipped
    assert min(losses[-3:]) < 0.9 * losses[0]
    again = start(VARIANTS[variant], "llama", precision=HALF, device=DEVICE, initial=load_initial(tmp_path))
    load(tmp_path, again.state)
    assert again.engine.state() == scaler


@pytest.mark.parametrize("variant", SCALED)
def test_fp16_learns_what_fp32_learns(variant: str) -> None:
    losses = []
    for precision in (FP32, HALF):
        run = start(VARIANTS[variant], "llama", updates=6, precision=precision, device=DEVICE)
        losses.append([step.loss for step in run.steps()])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-2)
