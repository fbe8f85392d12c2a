"""Who carries out an update: sums gradients over the workers, clips them, steps the optimizer.

The loop fills `parameter.grad` with sums of token losses already divided by the global number of target tokens; an
engine turns that into one update, with as many collective calls on every rank whatever its share was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet.errors import RunFailed
from tunefleet_strategies.contract import MethodOptimizer, Precision

_BUCKET_ENTRIES = 2**26
"""Entries of the flat fp32 gradient that travel in one all-reduce: 256 MiB. Most adapters fit in a single one."""

_SMALLEST_SCALE = 1.0
"""Below this loss scale fp16 gradients are not overflowing, they are broken."""


@dataclass(frozen=True)
class Applied:
    """What all ranks agree on after an update."""

    loss_sum: float
    """Token losses summed over the global batch."""
    grad_norm: float
    """Norm of the global gradient before clipping. Infinite where an fp16 step was skipped."""
    updated: bool
    """False: nothing to learn from (no target tokens), or fp16 overflowed and the scale was lowered."""
    stop: bool


class Engine(Protocol):
    """What the loop needs of whoever owns the optimizer."""

    model: nn.Module
    optimizer: Optimizer
    rank: int
    world: int
    bytes_sent: int
    """Payload that this rank has handed to collectives so far."""

    def start(self) -> None:
        """Make every rank's weights and buffers those of rank 0."""

    def loss_scale(self) -> float:
        """What losses are multiplied by before their backward; 1 except under fp16."""

    def update(self, loss_sum: Tensor, targets: int, *, step: int, stop: bool) -> Applied:
        """Apply the gradient of one global batch and clear it. Collective.

        Args:
            loss_sum: this rank's sum of token losses, a scalar.
            targets: target tokens of the global batch; with 0 of them nothing is updated.
            step: the update's number, from 1, for messages.
            stop: whether this rank has been asked to stop.

        Raises:
            RunFailed: the global gradient is not finite (on all ranks alike).
        """

    def messages(self) -> list[str]:
        """What the optimizer has to say of the last update."""

    def measurements(self) -> dict[str, float]:
        """The optimizer's own figures of the last update. Waits for the device."""

    def total(self, values: Tensor) -> Tensor:
        """Sum of a small fp64 tensor over the ranks. Collective."""

    def gather(self, data: Tensor) -> list[Tensor]:
        """Every rank's copy of a byte tensor of one common length, by rank. Collective."""

    def state(self) -> dict[str, float | int]:
        """What of the engine itself must survive a resume, plain numbers."""

    def restore(self, state: dict[str, float | int]) -> None:
        """Take back what `state` returned."""


class PlainEngine:
    """One device, or data parallel over the ranks of `torch.distributed`, without a wrapper around the model.

    No DDP: what trains may change during a run, and DDP would silently stop reducing it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, precision: Precision, *, max_grad_norm: float) -> None:
        """
        Args:
            max_grad_norm: largest norm of the global gradient; 0 switches clipping off.
        """
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1
        self.bytes_sent = 0
        self._device = next(model.parameters()).device
        self._scaler: torch.amp.GradScaler | None = None
        if precision.compute == torch.float16:
            self._scaler = torch.amp.GradScaler(self._device.type)

    def start(self) -> None:
        """Broadcast parameters and buffers from rank 0, as bytes, so that every dtype arrives unchanged."""
        if self.world == 1:
            return
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            data = tensor.detach().contiguous()
            flat = data.reshape(-1).view(torch.uint8)
            dist.broadcast(flat, src=0)
            self.bytes_sent += flat.numel()
            if data.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(data)

    def loss_scale(self) -> float:
        return 1.0 if self._scaler is None else self._scaler.scale(torch.ones((), device=self._device)).item()

    def update(self, loss_sum: Tensor, targets: int, *, step: int, stop: bool) -> Applied:
        method = self.optimizer if isinstance(self.optimizer, MethodOptimizer) else None
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if method is not None and method.steps_in_backward:
            parameters = []  # their gradients are used up, and were only this rank's
        for parameter in parameters:
            if parameter.grad is None:  # the same on all ranks and at every world size: untouched means zero
                parameter.grad = torch.zeros_like(parameter)
        knowledge = torch.stack([loss_sum.float(), torch.tensor(float(stop), device=self._device)])
        if self.world > 1:
            knowledge = self._reduce(parameters, knowledge)
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        norm = None if method is None else method.gradient_norm()
        if norm is None:
            norm = _global_norm([p.grad for p in parameters if p.grad is not None])
        loss, wants_stop, grad_norm = torch.cat([knowledge, norm[None]]).tolist()
        updated = self._apply(parameters, grad_norm, targets, step)
        self.optimizer.zero_grad(set_to_none=True)
        return Applied(loss, grad_norm, updated, wants_stop > 0)

    def _apply(self, parameters: list[nn.Parameter], grad_norm: float, targets: int, step: int) -> bool:
        finite = grad_norm < float("inf")  # false for nan too
        if not finite and (self._scaler is None or self._scaler.get_scale() <= _SMALLEST_SCALE):
            raise RunFailed(
                f"The gradient of step {step} is not finite (norm {grad_norm}): lower learning_rate, or look at the "
                "rows of that step."
            )
        if targets == 0:
            return False
        if finite and 0 < self.max_grad_norm < grad_norm:
            shrink = self.max_grad_norm / (grad_norm + 1e-6)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], shrink)
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        return finite

    def _reduce(self, parameters: Sequence[nn.Parameter], knowledge: Tensor) -> Tensor:
        """Sum gradients over the ranks, in fp32 and parameter order; `knowledge` rides in the last bucket."""
        buckets = _buckets(parameters)
        for position, bucket in enumerate(buckets):
            last = position == len(buckets) - 1
            pieces = [p.grad.reshape(-1).float() for p in bucket if p.grad is not None]
            flat = torch.cat([*pieces, knowledge] if last else pieces)
            dist.all_reduce(flat)
            self.bytes_sent += flat.numel() * flat.element_size()
            if last:
                flat, knowledge = flat[: -len(knowledge)], flat[-len(knowledge) :]
            for parameter, piece in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        return knowledge

    def messages(self) -> list[str]:
        return self.optimizer.messages() if isinstance(self.optimizer, MethodOptimizer) else []

    def measurements(self) -> dict[str, float]:
        return self.optimizer.measurements() if isinstance(self.optimizer, MethodOptimizer) else {}

    def total(self, values: Tensor) -> Tensor:
        values = values.to(self._device)
        if self.world > 1:
            dist.all_reduce(values)
            self.bytes_sent += values.numel() * values.element_size()
        return values.cpu()

    def gather(self, data: Tensor) -> list[Tensor]:
        if self.world == 1:
            return [data]
        data = data.to(self._device)
        gathered = [torch.empty_like(data) for _ in range(self.world)]
        dist.all_gather(gathered, data)
        self.bytes_sent += data.numel() * data.element_size()
        return [piece.cpu() for piece in gathered]

    def state(self) -> dict[str, float | int]:
        return {} if self._scaler is None else dict(self._scaler.state_dict())

    def restore(self, state: dict[str, float | int]) -> None:
        if self._scaler is not None:
            values: dict[str, Any] = dict(state)
            self._scaler.load_state_dict(values)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours share a bucket as long as it holds at most `_BUCKET_ENTRIES`; a larger parameter has one alone."""
    buckets: list[list[nn.Parameter]] = [[]]
    filled = 0
    for parameter in parameters:
        if buckets[-1] and filled + parameter.numel() > _BUCKET_ENTRIES:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.numel()
    return buckets


def _global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, fp32 scalar (the norms of the parts are accumulated in fp32 too)."""
    norms = torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float32))
    return torch.linalg.vector_norm(norms)  # type: ignore[no-any-return]
