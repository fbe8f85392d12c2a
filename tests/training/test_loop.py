"""The loop: every row once an epoch, token-weighted, stoppable at a step boundary, and evaluation without a trace."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.tiny import FP32, MemoryRows, start

from tunefleet.training.flops import TokenFlops
from tunefleet.training.loop import Feed, Gauge, evaluate, train
from tunefleet.training.loss import objective
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora

ROOT = Path(__file__).resolve().parents[2]


def test_an_epoch_sees_every_token_once_and_its_last_batch_is_short() -> None:
    rows = MemoryRows(count=11)
    run = start(Full(), "llama", rows=rows, global_batch=4, micro_batch=3, updates=6)
    steps = list(run.steps())
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert sum(step.tokens for step in steps[:3]) == int(rows.lengths.sum()) == sum(step.tokens for step in steps[3:])
    assert sum(step.target_tokens for step in steps[:3]) == int(rows.targets.sum())
    assert sum(run.feed.seen) == 2 * int(rows.lengths.sum())
    assert steps[2].epoch == 1.0
    assert steps[-1].epoch == 2.0
    assert not any(step.stopped for step in steps)


def test_the_reported_loss_is_the_mean_over_target_tokens() -> None:
    rows = MemoryRows(count=7)
    run = start(Full(), "llama", rows=rows, global_batch=7, micro_batch=2, updates=1)
    expected = evaluate(run.engine, objective(run.model, FP32), run.feed)
    assert next(run.steps()).loss == pytest.approx(expected, rel=1e-6)


def test_asked_to_stop_it_ends_after_the_step_that_runs() -> None:
    run = start(Full(), "llama", updates=6)
    asked = iter([False, True, True, True, True, True])
    loss = objective(run.model, FP32)
    steps = list(train(run.engine, loss, run.feed, run.batches, run.rate, should_stop=lambda: next(asked)))
    assert [step.stopped for step in steps] == [False, True]


def test_a_stop_during_the_last_step_is_an_ordinary_end() -> None:
    run = start(Full(), "llama", updates=1)
    loss = objective(run.model, FP32)
    steps = list(train(run.engine, loss, run.feed, run.batches, run.rate, should_stop=lambda: True))
    assert [step.stopped for step in steps] == [False]


def test_rows_without_targets_change_nothing() -> None:
    rows = MemoryRows(count=4)
    rows.rows = [row._replace(labels=row.labels * 0 - 100) for row in rows.rows]
    rows.targets = rows.targets * 0
    run = start(Full(), "llama", rows=rows, global_batch=4, updates=2)
    steps = list(run.steps())
    assert [step.loss for step in steps] == [0.0, 0.0]
    assert not run.moved().any()
    assert math.isnan(evaluate(run.engine, objective(run.model, FP32), run.feed))


def test_evaluation_leaves_random_states_and_modes_alone() -> None:
    run = start(Lora(lora_dropout=0.5), "gpt2")
    run.model.train()
    quiet = next(module for module in run.model.modules() if isinstance(module, torch.nn.Dropout))
    quiet.eval()
    loss = objective(run.model, FP32)
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    results = {evaluate(run.engine, loss, replace(run.feed, micro_batch=size)) for size in (1, 8)}
    assert max(results) - min(results) < 1e-6
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (str(np.random.get_state()), random.getstate())
    assert run.model.training
    assert not quiet.training
    assert all(p.grad is None for p in run.model.parameters())


def test_dropout_is_on_while_training() -> None:
    losses = []
    for dropout in (0.0, 0.5):
        run = start(Lora(lora_rank=4, lora_dropout=dropout, pissa_init=True, pissa_iter=4), "llama", updates=1)
        losses.append(next(run.steps()).loss)
    assert losses[0] != losses[1]


def test_threads_change_nothing() -> None:
    run = start(Full(), "llama")
    share = np.arange(24)
    plain = list(Feed(run.feed.rows, 5, None).micro_batches(share, torch.device("cpu")))
    threaded = list(Feed(run.feed.rows, 5, None, threads=2).micro_batches(share, torch.device("cpu")))
    assert len(plain) == len(threaded) == 5
    for one, other in zip(plain, threaded, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.target_positions, other.target_positions)


def test_utilisation_counts_the_operations_of_all_workers() -> None:
    gauge = Gauge(TokenFlops(body=100.0, head=10.0), peak=1000.0)
    assert gauge.utilisation(tokens=20, target_tokens=10, seconds=2.0, workers=2) == pytest.approx(2100 / 2 / 2000)


def test_importing_the_loop_brings_no_trainer_no_ray_no_datasets() -> None:
    # accelerate is not in the list: transformers imports it by itself wherever it is installed.
    program = (
        "import sys, tunefleet.training.loop, tunefleet.training.checkpoint, tunefleet.training.schedule\n"
        "heavy = {'ray', 'datasets', 'peft', 'pandas', 'transformers.trainer', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    path = f"{ROOT / 'platform'}:{ROOT / 'strategies'}"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_blank_micro_batches_keep_step_and_change_nothing(architecture: str) -> None:
    """Where passes are collective, a rank with fewer samples passes rows without a target through the model."""
    run = start(Full(), architecture)
    blanks = list(run.feed.micro_batches(np.arange(3), torch.device("cpu"), least=3))
    assert [len(batch.target_ids) > 0 for batch in blanks] == [True, False, False]
    assert len(list(run.feed.micro_batches(np.arange(3), torch.device("cpu"), least=1))) == 1
    loss, gradients = objective(run.model, FP32, lockstep=True), []
    for batches in (blanks[:1], blanks):
        calls: list[torch.Tensor] = []

        def backward(scaled: torch.Tensor, calls: list[torch.Tensor] = calls) -> None:
            calls.append(scaled.detach())
            scaled.backward()

        assert sum(loss.backward(batch, 9, run=backward) for batch in batches) == loss.evaluate(blanks[0])
        assert len(calls) == len(batches)
        gradients.append([p.grad for p in run.model.parameters() if p.grad is not None])
        run.model.zero_grad()
    assert loss.evaluate(blanks[1]) == 0
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
