"""The training loop: batches in, a stream of `Step` values out. It knows neither files nor Ray.

One update: the plan's global batch of samples is dealt to the ranks, each rank adds up the gradients of its
micro-batches (token losses / target tokens of the whole global batch), the engine sums over ranks, clips and steps.
Whoever iterates reports and checkpoints between two steps, which are the only places where state is whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tunefleet.data.batches import Batch, BatchSchedule, collate, deal, micro_batches, without_targets
from tunefleet.data.tokens import Row
from tunefleet.training.engines.engine import Engine
from tunefleet.training.flops import TokenFlops
from tunefleet.training.layout import evaluating
from tunefleet.training.loss import Objective
from tunefleet.training.random_state import capture, restore
from tunefleet.training.schedule import LearningRate
from tunefleet.training.step import Step
from tunefleet.training.stopwatch import Stopwatch


class Rows(Protocol):
    """The tokenised rows of a split, as `tunefleet.data.prepare.TokenSplit` gives them."""

    @property
    def lengths(self) -> np.ndarray: ...  # (rows,) tokens of each row
    @property
    def targets(self) -> np.ndarray: ...  # (rows,) target tokens of each row, after the shift
    def row(self, index: int) -> Row: ...


@dataclass(frozen=True)
class Feed:
    """How rows become micro-batches on a rank."""

    rows: Rows
    micro_batch: int
    """Samples of one forward and backward pass."""
    pad_token_id: int | None
    """None lays rows end to end; a token pads them (`layout.choose_layout` knows which)."""
    threads: int = 0
    """Threads that lay out coming micro-batches; 0 = in the loop itself. The result is the same."""

    def micro_batches(self, share: np.ndarray, device: torch.device, least: int = 0) -> Iterator[Batch]:
        """The micro-batches of this rank's share of a global batch, in order, on `device`.

        Args:
            least: blank micro-batches, of one row without a target, follow until there are so many.
        """
        pieces = micro_batches(share, self.micro_batch)
        if self.threads == 0:
            yield from (self._lay_out(piece, device) for piece in pieces)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                yield from pool.map(self._lay_out, pieces, [device] * len(pieces))
        for _ in range(least - len(pieces)):
            yield without_targets(self._lay_out(np.zeros(1, dtype=np.int64), device))

    def _lay_out(self, indices: np.ndarray, device: torch.device) -> Batch:
        batch = collate([self.rows.row(int(i)) for i in indices], pad_token_id=self.pad_token_id)
        return batch if device.type == "cpu" else _to(batch, device)


@dataclass(frozen=True)
class Gauge:
    """What MFU is measured against."""

    flops: TokenFlops
    peak: float
    """Operations a second of one worker's device (`flops.peak_flops`)."""

    def utilisation(self, tokens: int, target_tokens: int, seconds: float, workers: int) -> float:
        return self.flops.of(tokens, target_tokens) / seconds / (self.peak * workers)


def train(
    engine: Engine,
    objective: Objective,
    feed: Feed,
    batches: BatchSchedule,
    learning_rate: LearningRate,
    *,
    first: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    gauge: Gauge | None = None,
) -> Iterator[Step]:
    """Train from update `first` to the end of the schedule. Every rank iterates in step with the others.

    Args:
        first: updates already applied (`Progress.step` of a loaded checkpoint).
        should_stop: read by every rank before each update; when any says so, all stop after that update.

    Raises:
        RunFailed: a gradient is not finite.
    """
    device = next(engine.model.parameters()).device
    engine.model.train()
    for update in range(first, batches.updates):
        began = time.perf_counter()
        indices = batches.indices(update)
        tokens, targets = int(feed.rows.lengths[indices].sum()), int(feed.rows.targets[indices].sum())
        rate = learning_rate.set(update)
        watch = Stopwatch(device, lockstep=engine.lockstep)
        loss_sum = _backward(engine, objective, _dealt(engine, feed, indices, device), targets, watch)
        applied = engine.update(loss_sum, targets, step=update + 1, stop=should_stop())
        seconds = time.perf_counter() - began
        stopped = applied.stop and update + 1 < batches.updates
        yield Step(
            step=update + 1,
            epoch=batches.epoch(update + 1),
            loss=applied.loss_sum / max(targets, 1),
            learning_rate=rate,
            grad_norm=applied.grad_norm,
            tokens=tokens,
            target_tokens=targets,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            mfu=None if gauge is None else gauge.utilisation(tokens, targets, seconds, engine.world),
            stopped=stopped,
            pace=watch.pace(),
        )
        if stopped:
            return


def evaluate(engine: Engine, objective: Objective, feed: Feed) -> float:
    """Token losses / target tokens over all rows of `feed`, the rows dealt to the ranks. Collective.

    Leaves random states and every module's train or eval mode as they were.

    Returns:
        The token-weighted loss; nan when no row has a target.
    """
    device = next(engine.model.parameters()).device
    everything = np.arange(len(feed.rows.lengths))
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(engine.model), _untouched_random_state(engine):
        for batch in _dealt(engine, feed, everything, device):
            total += objective.evaluate(batch)
    targets = int(feed.rows.targets.sum())
    loss_sum = float(engine.total(total))
    return loss_sum / targets if targets else float("nan")


def _dealt(engine: Engine, feed: Feed, indices: np.ndarray, device: torch.device) -> Iterator[Batch]:
    """This rank's micro-batches of the rows `indices`; under a lockstep engine as many as the largest share has."""
    shares = deal(indices, feed.rows.lengths, engine.world)
    most = max(len(share) for share in shares)
    least = math.ceil(most / feed.micro_batch) if engine.lockstep else 0
    return feed.micro_batches(shares[engine.rank], device, least)


def _backward(engine: Engine, objective: Objective, batches: Iterator[Batch], targets: int, watch: Stopwatch) -> Tensor:
    """Add up this rank's gradients; a rank without samples, or a batch without targets, adds none."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=watch.device)
    scale = engine.loss_scale()
    if targets == 0:
        return loss_sum
    for batch in watch.waiting(batches):
        with watch.computing():
            loss_sum += objective.backward(batch, targets, scale, engine.backward)
    return loss_sum


@contextmanager
def _untouched_random_state(engine: Engine) -> Iterator[None]:
    before = capture(engine.model)
    try:
        yield
    finally:
        restore(before, engine.model)


def _to(batch: Batch, device: torch.device) -> Batch:
    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids.to(device, non_blocking=True),
        position_ids=batch.position_ids.to(device, non_blocking=True),
        attention_mask=None if mask is None else mask.to(device, non_blocking=True),
        target_positions=batch.target_positions.to(device, non_blocking=True),
        target_ids=batch.target_ids.to(device, non_blocking=True),
    )
