"""What every method must do, on four architectures: learn, leave the frozen alone, and not care how a batch is cut."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.contract.variants import ACCUMULATED, CELLS, VARIANTS
from tests.training.tiny import ARCHITECTURES, VOCABULARY, MemoryRows, build, start
from torch import nn
from transformers import AutoModelForCausalLM

from tunefleet.models import causal_lm
from tunefleet_strategies.registry import methods


def test_every_registered_method_has_a_cell() -> None:
    assert {type(strategy) for strategy in VARIANTS.values()} == set(methods())


@pytest.mark.parametrize(("variant", "architecture"), CELLS)
def test_it_learns_and_leaves_the_frozen_alone(variant: str, architecture: str) -> None:
    run = start(VARIANTS[variant], architecture, updates=12, rows=MemoryRows(count=8), learning_rate=1e-2)
    losses = [step.loss for step in run.steps()]
    assert min(losses[-3:]) < 0.9 * losses[0]
    for name, parameter in run.model.named_parameters():
        same = torch.equal(parameter, run.started[name])
        assert same or name in run.state.trained, f"{name} is frozen and moved"
    trained = run.state.trained
    moved = [name for name in trained if not torch.equal(run.model.get_parameter(name), run.started[name])]
    assert len(moved) > 0.9 * len(trained)


@pytest.mark.parametrize(("variant", "architecture"), ACCUMULATED)
def test_accumulation_of_four_equals_one(variant: str, architecture: str) -> None:
    moved, losses = [], []
    for micro_batch in (8, 2):
        run = start(VARIANTS[variant], architecture, updates=3, micro_batch=micro_batch, epsilon=1e-6)
        losses.append([step.loss for step in run.steps()])
        moved.append(run.moved())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert float((moved[0] - moved[1]).norm()) <= 1e-4 * float(moved[0].norm())


@pytest.mark.parametrize(("variant", "architecture"), CELLS)
def test_the_export_is_enough_to_rebuild(variant: str, architecture: str, tmp_path: Path) -> None:
    run = start(VARIANTS[variant], architecture, updates=3)
    list(run.steps())
    run.strategy.export(run.model, tmp_path, run.state.initial)
    rebuilt: nn.Module
    if run.strategy.traits().trains_base:
        rebuilt = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        rebuilt = PeftModel.from_pretrained(build(ARCHITECTURES[architecture]), tmp_path)
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    trained = copy.deepcopy(run.model).eval()
    causal_lm(trained).set_attn_implementation("sdpa")
    with torch.no_grad():
        expected, got = trained(input_ids=ids).logits, rebuilt.eval()(input_ids=ids).logits
        base = build(ARCHITECTURES[architecture]).eval()(input_ids=ids).logits
    span = float(expected.max() - expected.min())
    assert float((got - expected).abs().max()) <= 1e-5 * span
    assert float((base - expected).abs().max()) > 1e-4 * span, "training changed nothing, so this proved nothing"
