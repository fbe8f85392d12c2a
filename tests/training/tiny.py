"""Tiny models, rows and runs that the tests of the loop and of the contract share. No Ray, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tunefleet.data.batches import Batch, BatchSchedule
from tunefleet.data.tokens import Row
from tunefleet.training.checkpoint import RunState, trained_names
from tunefleet.training.determinism import seed_everything
from tunefleet.training.engines.engine import Engine
from tunefleet.training.engines.plain import PlainEngine
from tunefleet.training.layout import choose_layout
from tunefleet.training.loop import Feed, train
from tunefleet.training.loss import objective
from tunefleet.training.schedule import LearningRate, build_scheduler
from tunefleet.training.settings import TrainingSettings
from tunefleet.training.step import Step
from tunefleet_strategies.contract import AttachContext, OptimizerSpec, Precision, Strategy

VOCABULARY = 67
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_WIDTHS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED: dict[str, Any] = {**_IDS, **_WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 128}
_NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}

FP32 = Precision(torch.float32, torch.float32, torch.float32)
MIXED = Precision(torch.bfloat16, torch.float32, torch.bfloat16)
PURE = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16)

ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED, tie_word_embeddings=False)),
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=128, **_NO_DROPOUT)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_GROUPED, **_EXPERTS, tie_word_embeddings=False)),
}


def build(make: Callable[[], PreTrainedModel], seed: int = 3) -> PreTrainedModel:
    """The same random weights every time, large enough that attention and experts matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) if parameter.ndim > 1 else 0.0
    return model


class MemoryRows:
    """Rows in memory, with the attributes of a `TokenSplit`. Row lengths and target counts differ widely."""

    def __init__(self, count: int = 24, seed: int = 0, longest: int = 20, segments: int = 1) -> None:
        random = np.random.default_rng(seed)
        self.rows = [self._make(random, longest, segments) for _ in range(count)]
        self.lengths = np.array([len(row.input_ids) for row in self.rows], dtype=np.int64)
        self.targets = np.array([self._targets(row) for row in self.rows], dtype=np.int64)

    def row(self, index: int) -> Row:
        return self.rows[index]

    @staticmethod
    def _make(random: np.random.Generator, longest: int, segments: int) -> Row:
        lengths = random.integers(3, longest, segments)
        # A pattern to learn: every token follows from the one before it.
        start, stride = random.integers(3, VOCABULARY), random.integers(1, 4)
        ids = ((start + stride * np.arange(lengths.sum())) % (VOCABULARY - 3) + 3).astype(np.int32)
        labels = ids.copy()
        labels[: random.integers(0, len(ids) - 1)] = -100
        return Row(ids, labels, lengths.astype(np.int32))

    @staticmethod
    def _targets(row: Row) -> int:
        first = np.cumsum(row.segments) - row.segments
        learned = row.labels != -100
        learned[first] = False
        return int(learned.sum())


@dataclass(frozen=True)
class CountingFeed(Feed):
    """Counts the real tokens that this rank has really been fed."""

    seen: list[int] = field(default_factory=list)

    def micro_batches(self, share: np.ndarray, device: torch.device, least: int = 0) -> Iterator[Batch]:
        for batch in super().micro_batches(share, device, least):
            self.seen.append(batch.tokens)
            yield batch


@dataclass
class Run:
    """Everything that a worker would build, in its order."""

    model: nn.Module
    engine: Engine
    feed: CountingFeed
    batches: BatchSchedule
    rate: LearningRate
    state: RunState
    started: dict[str, Tensor]
    strategy: Strategy
    precision: Precision

    def steps(self, first: int = 0, last: int | None = None) -> Iterator[Step]:
        whole = not self.strategy.traits().accumulation
        loss = objective(self.model, self.precision, one_backward=whole, lockstep=self.engine.lockstep)
        for step in train(self.engine, loss, self.feed, self.batches, self.rate, first=first):
            yield step
            if step.step == last:
                return

    def moved(self) -> Tensor:
        """p - p_initial of everything that trains, in one vector."""
        trained = ((name, p) for name, p in self.model.named_parameters() if name in self.state.trained)
        return torch.cat([(p.detach().float() - self.started[name].float()).flatten() for name, p in trained])


def start(
    strategy: Strategy,
    architecture: str,
    *,
    initial: dict[str, Tensor] | None = None,
    updates: int = 4,
    global_batch: int = 8,
    micro_batch: int = 8,
    rows: MemoryRows | None = None,
    precision: Precision = FP32,
    settings: TrainingSettings | None = None,
    learning_rate: float = 3e-3,
    epsilon: float = 1e-8,
    seed: int = 5,
    device: str = "cpu",
    **engine: Any,
) -> Run:
    """A run at its beginning, as `worker.run` builds one. `engine` goes to `PlainEngine`."""
    rows = rows or MemoryRows()
    base = nn.Module.to(build(ARCHITECTURES[architecture]), device)
    model = strategy.attach(base, AttachContext(precision, seed, initial=initial))
    layout = choose_layout(model, precision)
    trained = trained_names(model)
    spec = OptimizerSpec("adamw_torch", learning_rate, eps=epsilon, weight_decay=0.01, seed=seed)
    optimizer = strategy.optimizer(model, spec)
    clipped = {"max_grad_norm": 0.5 if strategy.traits().clipping else 0.0}
    plain = PlainEngine(model, optimizer, precision, **(clipped | engine))
    plain.start()
    kept = initial if initial is not None else strategy.initial_state(model)
    settings = settings or TrainingSettings(lr_scheduler_type="cosine", warmup_steps=1)
    started = {name: p.detach().clone() for name, p in model.named_parameters()}
    seed_everything(seed, plain.rank)
    return Run(
        model=model,
        engine=plain,
        feed=CountingFeed(rows, micro_batch, 2 if layout.padded else None),
        batches=BatchSchedule(len(rows.rows), global_batch, updates, seed),
        rate=build_scheduler(optimizer, settings, updates),
        state=RunState(plain, trained, kept),
        started=started,
        strategy=strategy,
        precision=precision,
    )
