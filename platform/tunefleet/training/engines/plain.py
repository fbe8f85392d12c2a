"""Every rank holds everything: sums gradients over the workers, clips them, steps the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet.errors import RunFailed
from tunefleet.models import causal_lm
from tunefleet.training.engines.engine import Applied
from tunefleet.training.engines.ranks import Ranks
from tunefleet.training.files import digest, load_pickle, load_tensors, save_tensors
from tunefleet_strategies.contract import MethodOptimizer, Precision

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.pt"

_BUCKET_ENTRIES = 2**26
"""Entries of the flat fp32 gradient that travel in one all-reduce: 256 MiB. Most adapters fit in a single one."""

_SMALLEST_SCALE = 1.0
"""Below this loss scale fp16 gradients are not overflowing, they are broken."""


class PlainEngine(Ranks):
    """One device, or data parallel over the ranks of `torch.distributed`, without a wrapper around the model.

    No DDP: what trains may change during a run, and DDP would silently stop reducing it.
    """

    kept_as = "plain data parallelism"
    lockstep = False

    def __init__(self, model: nn.Module, optimizer: Optimizer, precision: Precision, *, max_grad_norm: float) -> None:
        """
        Args:
            max_grad_norm: largest norm of the global gradient; 0 switches clipping off.
        """
        super().__init__(next(model.parameters()).device)
        self.model = model
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self._scaler: torch.amp.GradScaler | None = None
        if precision.compute == torch.float16:
            self._scaler = torch.amp.GradScaler(self._device.type)

    def start(self) -> None:
        """Broadcast parameters and buffers from rank 0, as bytes, so that every dtype arrives unchanged."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._share(tensor)

    def forward(self, inputs: dict[str, Any]) -> Any:
        return causal_lm(self.model)(**inputs)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

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
            raise RunFailed(not_finite(step, grad_norm))
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
            self.bytes_counted += flat.numel() * flat.element_size()
            if last:
                flat, knowledge = flat[: -len(knowledge)], flat[-len(knowledge) :]
            for parameter, piece in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        return knowledge

    def messages(self) -> list[str]:
        return self.optimizer.messages() if isinstance(self.optimizer, MethodOptimizer) else []

    def measurements(self) -> dict[str, float]:
        return self.optimizer.measurements() if isinstance(self.optimizer, MethodOptimizer) else {}

    def state(self) -> dict[str, float | int]:
        return {} if self._scaler is None else dict(self._scaler.state_dict())

    def restore(self, state: dict[str, float | int]) -> None:
        if self._scaler is not None:
            values: dict[str, Any] = dict(state)
            self._scaler.load_state_dict(values)

    def save_weights(self, folder: Path, names: frozenset[str]) -> None:
        if self.rank == 0:
            save_tensors(self._weights(names), folder / WEIGHTS)

    @torch.no_grad()
    def load_weights(self, folder: Path, names: frozenset[str]) -> None:
        put(self._weights(names), load_tensors(folder / WEIGHTS))

    def save_optimizer(self, folder: Path) -> None:
        if self.rank == 0:
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)

    def load_optimizer(self, folder: Path) -> None:
        load_keeping_dtypes(self.optimizer, load_pickle(folder / OPTIMIZER))

    def digests(self) -> dict[str, str]:
        everything = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {"weights": digest(everything), "optimizer": digest(self.optimizer.state_dict())}

    def whole_model(self) -> nn.Module:
        return self.model

    def _weights(self, names: frozenset[str]) -> dict[str, Tensor]:
        trained = {name: p.detach() for name, p in self.model.named_parameters() if name in names}
        return trained | {f"buffer:{name}": b.detach() for name, b in self.model.named_buffers()}


def not_finite(step: int, grad_norm: float) -> str:
    """The sentence on a gradient that no update can be made of."""
    return (
        f"The gradient of step {step} is not finite (norm {grad_norm}): lower learning_rate, or look at the rows of "
        "that step."
    )


def load_keeping_dtypes(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict`, then undo its cast: torch gives floating-point state the dtype of its parameter.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it was saved by another optimizer.
    """
    optimizer.load_state_dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.state_dict()["state"].keys() != saved["state"].keys():
        raise ValueError("the optimizer keeps state of other parameters")
    for index, stored in saved["state"].items():
        if not isinstance(index, int):  # an optimizer with its own layout restores it itself
            continue
        live = optimizer.state[parameters[index]]
        for name, value in stored.items():
            if isinstance(value, Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(live[name].device)


def put(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into live ones.

    Raises:
        ValueError: they are not of the same names, shapes and dtypes.
    """
    if expected.keys() != stored.keys():
        odd = sorted(expected.keys() ^ stored.keys())
        raise ValueError(f"{len(odd)} tensors are not in both, the first is {odd[0]}")
    for name, tensor in expected.items():
        if tensor.shape != stored[name].shape or tensor.dtype != stored[name].dtype:
            raise ValueError(f"{name} has another shape or dtype")
        tensor.copy_(stored[name])


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
