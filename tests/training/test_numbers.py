"""Precision, seeds, random states, schedules and operation counts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.tiny import ARCHITECTURES, FP32, MIXED, PURE, build, start
from torch import nn

from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.models import expert_share, model_shape
from tunefleet.training.activations import checkpoint_activations
from tunefleet.training.determinism import seed_everything
from tunefleet.training.flops import peak_flops, token_flops
from tunefleet.training.loss import objective
from tunefleet.training.precision import resolve
from tunefleet.training.random_state import capture, restore
from tunefleet.training.schedule import build_scheduler
from tunefleet.training.settings import TrainingSettings
from tunefleet_strategies.contract import AttachContext, ModelShape, ParameterShape
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora

MODERN, OLD = Hardware("cpu", bf16=True), Hardware("cpu", bf16=False)


@pytest.mark.parametrize(
    ("keys", "hardware", "expected", "notices"),
    [
        ({"bf16": True}, MODERN, MIXED, 0),
        ({"bf16": True}, OLD, MIXED, 1),
        ({"bf16": False}, MODERN, FP32, 0),
        ({}, MODERN, MIXED, 1),
        ({}, OLD, FP32, 0),
        ({"pure_bf16": True}, MODERN, PURE, 0),
        ({"bf16": True, "pure_bf16": True}, MODERN, PURE, 0),
    ],
)
def test_number_formats(keys: dict[str, Any], hardware: Hardware, expected: object, notices: int) -> None:
    precision, said = resolve(TrainingSettings(**keys), hardware)
    assert precision == expected
    assert len(said) == notices


def test_fp16_on_a_gpu_only() -> None:
    with pytest.raises(Refused, match="CPU"):
        resolve(TrainingSettings(fp16=True), MODERN)
    precision, _ = resolve(TrainingSettings(fp16=True), Hardware("cuda", bf16=True))
    assert (precision.compute, precision.trainable) == (torch.float16, torch.float32)
    with pytest.raises(Refused, match="bf16 and fp16"):
        resolve(TrainingSettings(fp16=True, bf16=True), Hardware("cuda", bf16=True))


def draw() -> tuple[float, float, float, float, float]:
    # Two Gaussian draws each, because the generators keep the second for later.
    return float(torch.rand(1)), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)


def test_random_states_come_back_whole() -> None:
    model = nn.Linear(1, 1)
    seed_everything(3, rank=1)
    draw()
    state = capture(model)
    first = [draw() for _ in range(5)]
    assert [draw() for _ in range(5)] != first
    restore(state, model)
    assert [draw() for _ in range(5)] == first
    with pytest.raises(RuntimeError):
        restore(state[:100], model)


def test_ranks_draw_different_numbers_and_the_same_again() -> None:
    drawn = []
    for rank in (0, 1, 0):
        seed_everything(11, rank)
        drawn.append(draw())
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_the_rate_is_that_of_transformers_at_every_step(name: str) -> None:
    from transformers.optimization import get_scheduler

    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(1))]},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5},
    ]
    ours, theirs = (torch.optim.SGD([dict(group) for group in groups], lr=0.1) for _ in range(2))
    rate = build_scheduler(ours, TrainingSettings(lr_scheduler_type=name, warmup_ratio=0.2), 10)
    reference = get_scheduler(name, theirs, num_warmup_steps=2, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append([group["lr"] for group in theirs.param_groups])
        theirs.step()
        reference.step()
    for update in (7, 0, 3, 9):  # in any order: a pure function of the step
        assert rate.set(update) == pytest.approx(expected[update][0])
        assert [group["lr"] for group in ours.param_groups] == pytest.approx(expected[update])


def test_operations_of_a_token_by_hand() -> None:
    """One layer of 100 entries twice, a head of 70: 6, 4 and 2 per entry, as what trains says."""

    def shape(trainable: list[bool]) -> ModelShape:
        sides = [(7, 10), (10, 10), (10, 10), (7, 10)]
        names = ["embed_tokens.weight", "layers.0.w", "layers.1.w", "lm_head.weight"]
        parts = (ParameterShape(n, s, t) for n, s, t in zip(names, sides, trainable, strict=True))
        return ModelShape("x", vocab_size=7, hidden_size=10, layers=2, parameters=tuple(parts))

    full = token_flops(shape([True] * 4))
    assert (full.body, full.head) == (6 * 200, 6 * 70)
    last = token_flops(shape([False, False, True, False]))
    assert (last.body, last.head) == (2 * 100 + 4 * 100, 4 * 70)
    assert full.of(tokens=3, target_tokens=2) == 3 * 1200 + 2 * 420


@pytest.mark.parametrize("architecture", ["llama", "qwen2_tied"])
def test_operations_of_the_methods(architecture: str) -> None:
    def count(strategy: Full | Freeze | Lora) -> float:
        model = strategy.attach(build(ARCHITECTURES[architecture]), AttachContext(FP32))
        return token_flops(model_shape(model)).body

    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert count(Full()) == 6 * matrices
    assert count(Freeze(freeze_trainable_layers=1)) == pytest.approx((2 + 6) / 2 * matrices, rel=0.1)
    assert count(Lora(lora_rank=1)) == pytest.approx(4 * matrices, rel=0.25)


def test_a_token_meets_only_some_experts() -> None:
    assert expert_share(build(ARCHITECTURES["qwen3_moe"])) == 0.5
    assert expert_share(build(ARCHITECTURES["llama"])) == 1.0


def test_the_peak_is_measured_once() -> None:
    peak = peak_flops(torch.float32, "cpu")
    assert 1e9 < peak < 1e13
    assert peak_flops(torch.float32, "cpu") == peak


def test_checkpointed_activations_give_the_same_step() -> None:
    moved = []
    for asked in (False, True):
        run = start(Lora(lora_rank=4, lora_dropout=0.3), "llama", updates=2)
        kept: list[int] = []
        if asked:
            checkpoint_activations(run.model)

        def keep(saved: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(saved.nbytes)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            run.model.train()
            batch = next(run.feed.micro_batches(np.arange(8), torch.device("cpu")))
            states = objective(run.model, FP32)._supervised_states(batch)
        del states
        seed_everything(1, 0)
        list(run.steps())
        moved.append((run.moved(), sum(kept)))
    assert torch.equal(moved[0][0], moved[1][0])
    assert moved[1][1] < 0.5 * moved[0][1]
