"""BAdam in the training loop: exact resume in every mode, a backward pass that ends below the active block."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.tiny import FP32, MIXED, PURE, MemoryRows, Run, start
from torch import Tensor, nn

from tunefleet.training.activations import checkpoint_activations
from tunefleet.training.checkpoint import fingerprints, load, save
from tunefleet.training.progress import Progress
from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.contract import Precision
from tunefleet_strategies.optim.block_adamw import BlockAdamW

ENDS: dict[str, Any] = {"badam_include_embedding": True, "badam_include_lm_head": True}

MODES = {
    "ascending": BAdam(badam_switch_interval=2, **ENDS),
    "descending": BAdam(badam_switch_interval=2, badam_switch_mode="descending", **ENDS),
    "random": BAdam(badam_switch_interval=2, badam_switch_mode="random", badam_start_block=2, **ENDS),
    "fixed": BAdam(badam_switch_interval=2, badam_switch_mode="fixed", badam_start_block=1),
    "never": BAdam(badam_switch_interval=-1, badam_switch_mode="random"),
    "adjacent": BAdam(badam_mode="ratio", badam_switch_interval=2, badam_update_ratio=0.3),
    "scatter": BAdam(badam_mode="ratio", badam_switch_interval=2, badam_update_ratio=0.3, badam_mask_mode="scatter"),
}
UPDATES = 16
"""Two rounds over four blocks (embedding, two layers, head) of two updates each; windows wrap around."""


def begin(mode: str, precision: Precision) -> Run:
    return start(
        MODES[mode],
        "llama",
        updates=UPDATES,
        global_batch=2,
        micro_batch=2,
        rows=MemoryRows(longest=8),
        precision=precision,
        learning_rate=1e-2,
    )


@pytest.mark.parametrize("precision", [FP32, PURE], ids=["fp32", "pure_bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_interrupted_at_every_update_of_two_rounds(mode: str, precision: Precision, tmp_path: Path) -> None:
    """Each attempt goes one update further than a checkpoint, so that every checkpoint of the chain is gone on from."""
    twin = begin(mode, precision)
    losses, hashes = [], []
    for step in twin.steps():
        losses.append(step.loss)
        hashes.append(fingerprints(twin.state))
    run = begin(mode, precision)
    for update in range(UPDATES):
        folder = tmp_path / str(update)
        folder.mkdir()
        save(folder, run.state, Progress(step=update))
        run = begin(mode, precision)
        load(folder, run.state)
        (step,) = run.steps(first=update, last=update + 1)
        assert step.loss == losses[update], update
        assert fingerprints(run.state) == hashes[update], update
    assert len({one["weights"] for one in hashes}) == UPDATES


def test_a_moment_that_is_loaded_in_bf16_changes_the_result(tmp_path: Path) -> None:
    """The comparison above can go red."""
    run = begin("ascending", PURE)
    hashes = [fingerprints(run.state) for _ in run.steps(last=4)]
    first = begin("ascending", PURE)
    list(first.steps(last=3))
    save(tmp_path, first.state, Progress(step=3))
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    for tensors in state["state"].values():
        tensors["exp_avg"] = tensors["exp_avg"].bfloat16().float()
    torch.save(state, tmp_path / "optimizer.pt")
    again = begin("ascending", PURE)
    load(tmp_path, again.state)
    list(again.steps(first=3, last=4))
    assert fingerprints(again.state) != hashes[3]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", [FP32, MIXED, PURE], ids=["fp32", "bf16", "pure_bf16"])
def test_the_backward_pass_ends_below_the_active_block(precision: Precision, checkpointed: bool) -> None:
    """Nothing asks for a gradient of the embedding's output, gradient checkpointing included."""
    run = start(MODES["fixed"], "llama", updates=2, precision=precision)
    assert isinstance(run.engine.optimizer, BlockAdamW)
    if checkpointed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            checkpoint_activations(run.model)
    seen: dict[str, set[bool]] = {}
    watched = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            if torch.is_grad_enabled():
                seen.setdefault(name, set()).add(output.requires_grad)

        return hook

    for name in watched:
        run.model.get_submodule(name).register_forward_hook(watch(name))
    list(run.steps())
    assert [seen[name] for name in watched] == [{False}, {False}, {True}, {True}]


def test_skipped_updates_do_not_shift_the_walk() -> None:
    """A global batch without a target token applies nothing, so it counts for nothing."""
    rows = MemoryRows(count=8)
    for index in (1, 4):
        rows.rows[index].labels[:] = -100
        rows.targets[index] = 0
    run = start(MODES["ascending"], "llama", updates=8, global_batch=1, micro_batch=1, rows=rows)
    optimizer = run.engine.optimizer
    assert isinstance(optimizer, BlockAdamW)
    applied = 0
    for step in run.steps():
        applied += step.target_tokens > 0
        assert optimizer.updates == applied
        assert optimizer.active.label == optimizer.blocks[(applied // 2) % 4].label
    assert applied == 6


@pytest.fixture
def small_heap() -> Iterator[None]:
    """The published optimizer collects garbage at every switch, which takes long with many modules loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("mode", ["layer", "ratio"])
@pytest.mark.usefixtures("small_heap")
def test_the_published_optimizers_train_in_the_loop_too(mode: Any) -> None:
    strategy = BAdam(badam_mode=mode, optimizer_backend="upstream", badam_switch_interval=3, badam_update_ratio=0.5)
    architectures = ("gpt2", "qwen3_moe") if mode == "layer" else ("llama", "qwen3_moe")
    for architecture in architectures:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it expects half-precision weights
            run = start(strategy, architecture, updates=12, rows=MemoryRows(count=8), learning_rate=1e-2)
            steps = list(run.steps())
        assert min(step.loss for step in steps[-3:]) < 0.95 * steps[0].loss
        assert max(step.grad_norm for step in steps) > 0.5, "clipping was never needed, so it was not tested"
