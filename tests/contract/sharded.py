"""Runs under FSDP2, built as a worker builds them, on the models of `tests.training.tiny` put on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.training.tiny import ARCHITECTURES, FP32, CountingFeed, MemoryRows, Run, build
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunefleet.data.batches import BatchSchedule
from tunefleet.model_settings import ModelSettings
from tunefleet.training.checkpoint import RunState, trained_names
from tunefleet.training.determinism import seed_everything
from tunefleet.training.engines.fsdp import FsdpEngine
from tunefleet.training.engines.loading import Source
from tunefleet.training.engines.sharding import settle
from tunefleet.training.layout import choose_layout
from tunefleet.training.schedule import build_scheduler
from tunefleet.training.settings import TrainingSettings
from tunefleet_strategies.contract import AttachContext, OptimizerSpec, Precision, Strategy

CPU = torch.device("cpu")


def on_disk(architecture: str, folder: Path) -> Path:
    """A folder with the tiny model, as transformers writes it."""
    build(ARCHITECTURES[architecture]).save_pretrained(folder)
    return folder


@dataclass
class ShardedRun(Run):
    source: Source

    def moved(self) -> Tensor:
        """p - p_initial of everything that trains, whole on rank 0; nothing elsewhere. Collective."""
        whole = dict(self.engine.whole_model().named_parameters())
        if self.engine.rank != 0:
            return torch.empty(0)
        return torch.cat([(whole[name].float() - self.started[name]).flatten() for name in self.started])


def start_sharded(
    strategy: Strategy,
    folder: Path,
    *,
    updates: int = 4,
    global_batch: int = 8,
    micro_batch: int = 8,
    rows: MemoryRows | None = None,
    precision: Precision = FP32,
    learning_rate: float = 3e-3,
    epsilon: float = 1e-8,
    seed: int = 5,
    checkpointed: bool = False,
) -> ShardedRun:
    """What `tests.training.tiny.start` gives, under FSDP2. Collective."""
    rows = rows or MemoryRows()
    settings = ModelSettings(model_name_or_path=str(folder))
    source = Source.open(settings, strategy, AttachContext(precision, seed))
    model = source.sharded(CPU, checkpointed=checkpointed)
    trained = trained_names(model)
    settle(model, precision, CPU)
    optimizer = strategy.optimizer(
        model, OptimizerSpec("adamw_torch", learning_rate, eps=epsilon, weight_decay=0.01, seed=seed)
    )
    engine = FsdpEngine(model, optimizer, max_grad_norm=0.5, shell=source.shell)
    engine.start()
    layout = choose_layout(model, precision)
    whole = dict(engine.whole_model().named_parameters())
    seed_everything(seed, engine.rank)
    return ShardedRun(
        model=engine.model,
        engine=engine,
        feed=CountingFeed(rows, micro_batch, 2 if layout.padded else None),
        batches=BatchSchedule(len(rows.rows), global_batch, updates, seed),
        rate=build_scheduler(optimizer, TrainingSettings(lr_scheduler_type="cosine", warmup_steps=1), updates),
        state=RunState(engine, trained),
        started={name: p.detach().float() for name, p in whole.items() if name in trained and p.device.type != "meta"},
        strategy=strategy,
        precision=precision,
        source=source,
    )


def local_bytes(tensors: Iterator[Any]) -> int:
    """Bytes of the storages behind tensors on this rank, each once."""
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def state_bytes(run: Run) -> int:
    """Bytes of this rank's moments and masters."""
    states = run.engine.optimizer.state.values()
    return local_bytes(t for state in states for name, t in state.items() if name != "step")


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of this rank's part of the parameters."""
    return local_bytes(p.detach() for p in model.parameters())
