"""FSDP2: torch's `fully_shard` shares rows of every parameter, its gradient and its optimizer state over the ranks.

Each parameter is a `DTensor` of which a rank holds some rows. A decoder layer is gathered whole for its own forward and
backward pass only, and its gradient is summed and shared out again as soon as it is known. That happens in the backward
pass of *every* micro-batch: adding gradients up before they are shared out would need room for the whole gradient on
each rank, and would save at most a third of what is sent, for the weights are gathered for each micro-batch anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ByRows
from torch.optim import Optimizer

from tunefleet.errors import RunFailed
from tunefleet.models import causal_lm
from tunefleet.training.engines.engine import Applied
from tunefleet.training.engines.plain import load_keeping_dtypes, not_finite, put
from tunefleet.training.engines.ranks import Ranks
from tunefleet.training.engines.sharding import rest
from tunefleet.training.engines.shards import Shard, Span, load_shards, save_shards, shard_file, stored_shards
from tunefleet.training.files import digest, load_pickle, load_tensors, save_tensors
from tunefleet_strategies.contract import MethodOptimizer

WEIGHTS, BUFFERS = "weights", "buffers.safetensors"
OPTIMIZER, OPTIMIZER_LAYOUT = "optimizer", "optimizer.pt"

_SHARDED = "sharded"
"""The one key of what stands in the optimizer's layout for a tensor that the ranks have written."""


class FsdpEngine(Ranks):
    """A model that `shard` has been at, and an optimizer over its parameters."""

    kept_as = "sharding: fsdp2"
    lockstep = True

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, max_grad_norm: float, shell: Callable[[], nn.Module]
    ) -> None:
        """
        Args:
            max_grad_norm: largest norm of the global gradient; 0 switches clipping off.
            shell: makes the same model with its method, unsharded, parameters on the meta device.
        """
        first = next(model.parameters())
        super().__init__(first.device)
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self._model = model
        self._shell = shell
        self._mesh = _sharded(first).device_mesh
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _sharded(parameter)  # one that was gathered when the optimizer was built would never be seen to move
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_CountedAllGather(self))
                module.set_custom_reduce_scatter(_CountedReduceScatter(self))

    @property
    def model(self) -> nn.Module:
        """Its parameters as every pass finds them: shared out."""
        rest(self._model)
        return self._model

    def start(self) -> None:
        """Broadcast buffers from rank 0. Every rank has read its rows of the weights itself."""
        for tensor in self.model.buffers():
            self._share(tensor)

    def loss_scale(self) -> float:
        return 1.0

    def forward(self, inputs: dict[str, Any]) -> Any:
        return causal_lm(self._model)(**inputs)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def update(self, loss_sum: Tensor, targets: int, *, step: int, stop: bool) -> Applied:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [_rows(cast(Tensor, p.grad)) for p in parameters]
        square = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double().square().sum()
        wish = torch.tensor(float(stop), dtype=torch.float64, device=self._device)
        loss, wants_stop, square = self.total(torch.stack([loss_sum.double(), wish, square])).tolist()
        grad_norm = square**0.5
        if not grad_norm < float("inf"):
            raise RunFailed(not_finite(step, grad_norm))
        if targets > 0:
            if 0 < self.max_grad_norm < grad_norm:
                torch._foreach_mul_(gradients, self.max_grad_norm / (grad_norm + 1e-6))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Applied(loss, grad_norm, targets > 0, wants_stop > 0)

    def messages(self) -> list[str]:
        return self.optimizer.messages() if isinstance(self.optimizer, MethodOptimizer) else []

    def measurements(self) -> dict[str, float]:
        return self.optimizer.measurements() if isinstance(self.optimizer, MethodOptimizer) else {}

    def state(self) -> dict[str, float | int]:
        return {}

    def restore(self, state: dict[str, float | int]) -> None:
        """There is nothing to take back."""

    def save_weights(self, folder: Path, names: frozenset[str]) -> None:
        save_shards(self._weights(names), shard_file(folder, WEIGHTS, self.rank, self.world))
        if self.rank == 0:
            save_tensors(dict(self.model.named_buffers()), folder / BUFFERS)

    @torch.no_grad()
    def load_weights(self, folder: Path, names: frozenset[str]) -> None:
        load_shards(folder, WEIGHTS, self._weights(names))
        put(dict(self.model.named_buffers()), load_tensors(folder / BUFFERS))

    def save_optimizer(self, folder: Path) -> None:
        """Rank 0 writes the layout of the state, every rank its rows of the tensors that the layout names."""
        shards: dict[str, Shard] = {}
        layout = self._split(self.optimizer.state_dict(), "", shards)
        save_shards(shards, shard_file(folder, OPTIMIZER, self.rank, self.world))
        if self.rank == 0:
            torch.save(layout, folder / OPTIMIZER_LAYOUT)

    @torch.no_grad()
    def load_optimizer(self, folder: Path) -> None:
        """Read this rank's rows whatever the number of ranks that wrote, then as the plain engine does."""
        layout = load_pickle(folder / OPTIMIZER_LAYOUT)
        shards: dict[str, Shard] = {}
        for name, entry in stored_shards(folder, OPTIMIZER).items():
            span = Span.of(entry.whole[0], self.rank, self.world)
            local = torch.empty(span.stop - span.start, *entry.whole[1:], dtype=entry.dtype, device=self._device)
            shards[name] = Shard(local, span.start, entry.whole)
        load_shards(folder, OPTIMIZER, shards)
        load_keeping_dtypes(self.optimizer, self._join(layout, shards))

    def digests(self) -> dict[str, str]:
        """Hashes over the hashes of every rank's part, so they depend on the number of ranks."""
        local = {name: _rows(p) for name, p in self.model.named_parameters()} | dict(self.model.named_buffers())
        shards: dict[str, Shard] = {}
        layout = self._split(self.optimizer.state_dict(), "", shards)
        optimizer = {"layout": layout, "rows": {name: shard.local for name, shard in shards.items()}}
        return {"weights": self._agreed(digest(local)), "optimizer": self._agreed(digest(optimizer))}

    @torch.no_grad()
    def whole_model(self) -> nn.Module:
        """On rank 0 the whole model on the CPU, one parameter gathered after the other; elsewhere a shell."""
        shell = self._shell()
        for name, parameter in self.model.named_parameters():
            whole = self._gathered(_sharded(parameter))
            if whole is not None:
                replace_parameter(shell, name, whole)
        for name, buffer in self.model.named_buffers():
            shell.get_buffer(name).copy_(buffer)
        return shell

    def _weights(self, names: frozenset[str]) -> dict[str, Shard]:
        return {name: self._shard(_sharded(p)) for name, p in self.model.named_parameters() if name in names}

    def _shard(self, tensor: DTensor) -> Shard:
        span = Span.of(tensor.shape[0], self.rank, self.world)
        return Shard(_rows(tensor), span.start, tuple(tensor.shape))

    def _split(self, value: Any, path: str, shards: dict[str, Shard]) -> Any:
        """The value with a name in the place of every tensor that is shared out; those go into `shards`."""
        if isinstance(value, DTensor):
            shards[path] = self._shard(value)
            return {_SHARDED: path}
        if isinstance(value, Mapping):
            return {key: self._split(item, f"{path}/{key}", shards) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._split(item, f"{path}/{place}", shards) for place, item in enumerate(value))
        return value

    def _join(self, value: Any, shards: Mapping[str, Shard]) -> Any:
        """What `_split` took apart."""
        if isinstance(value, Mapping):
            if value.keys() == {_SHARDED}:
                return self._distributed(shards[value[_SHARDED]])
            return {key: self._join(item, shards) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._join(item, shards) for item in value)
        return value

    def _distributed(self, shard: Shard) -> DTensor:
        stride = torch.empty(shard.whole, device="meta").stride()
        return DTensor.from_local(
            shard.local, self._mesh, [ByRows(0)], run_check=False, shape=torch.Size(shard.whole), stride=stride
        )

    def _agreed(self, own: str) -> str:
        parts = self.gather(torch.frombuffer(bytearray.fromhex(own), dtype=torch.uint8))
        return digest([part.numpy().tobytes().hex() for part in parts])

    def _gathered(self, tensor: DTensor) -> Tensor | None:
        """The whole tensor in the memory of rank 0, None elsewhere. Collective."""
        local = _rows(tensor)
        span = Span.of(tensor.shape[0], self.rank, self.world)
        padded = local.new_zeros(span.chunk, *local.shape[1:])
        padded[: len(local)] = local
        flat = padded.reshape(-1).view(torch.uint8)
        if self.world == 1:
            pieces = [flat]
        else:
            pieces = [torch.empty_like(flat) for _ in range(self.world)] if self.rank == 0 else []
            dist.gather(flat, pieces or None, dst=0)
            self.bytes_counted += flat.numel()
        if self.rank != 0:
            return None
        rows = [piece.view(local.dtype).view(span.chunk, *local.shape[1:]) for piece in pieces]
        return torch.cat(rows)[: tensor.shape[0]].cpu()


def replace_parameter(model: nn.Module, name: str, values: Tensor) -> None:
    """Put values in the place of a parameter, also where other modules share it."""
    old = model.get_parameter(name)
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter is old:
                module.register_parameter(own, new)


def _sharded(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor), "fully_shard left a parameter whole"
    return tensor


def _rows(tensor: Tensor) -> Tensor:
    """This rank's rows, as a view."""
    return _sharded(tensor.detach()).to_local()


class _CountedAllGather(AllGather):
    """torch's own, with the payload counted."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self.ranks.bytes_counted += input_tensor.numel() * input_tensor.element_size()
        return cast(
            "dist.Work | None",
            dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op),
        )


class _CountedReduceScatter(ReduceScatter):
    """torch's own, with the payload counted."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self.ranks.bytes_counted += input_tensor.numel() * input_tensor.element_size()
        return cast(
            "dist.Work | None",
            dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op),
        )
