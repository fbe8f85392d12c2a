"""From a model without weights to one that `fully_shard` shares out, its rows filled in from wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tunefleet.models import causal_lm
from tunefleet.training.engines.shards import Span
from tunefleet.training.layout import evaluating
from tunefleet.training.precision import autocast
from tunefleet_strategies.contract import Precision

Rows = Callable[[str, int, int], Tensor]
"""Rows of a parameter: its name, the first row, and the last but one."""


def shard(model: nn.Module, layers: Sequence[nn.Module], precision: Precision, device: torch.device) -> None:
    """Share every parameter out by rows: each decoder layer is a group that is gathered for its own passes only.

    Under autocast the layers are gathered in the compute format, so that no copy of a weight in that format has to be
    kept for the backward pass. What stands outside the layers is gathered as it is held: autocast turns the head into
    the compute format, and embeddings stay exact.

    Args:
        model: its parameters on the meta device.
    """
    everyone = dist.group.WORLD
    assert everyone is not None, "fully_shard needs a process group, also of one"
    mesh = DeviceMesh.from_group(everyone, device.type)
    held = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    inside = MixedPrecisionPolicy(
        param_dtype=precision.compute if precision.autocast else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=inside)
    base = causal_lm(model)
    embedding = base.get_input_embeddings()
    if not _shares(embedding, base):
        fully_shard(embedding, mesh=mesh, mp_policy=held)
        _as_fsdp(embedding).set_unshard_in_backward(False)  # its gradient does not depend on it
    fully_shard(base, mesh=mesh, mp_policy=held)
    root = _as_fsdp(base)
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # gradients are summed: losses are divided already
            module.set_force_sum_reduction_for_comms(True)  # gloo knows neither averages nor scaled sums
    root.set_reduce_scatter_unused_params(True)  # else ranks whose tokens missed a parameter would reduce another set


@torch.no_grad()
def fill(model: nn.Module, rows: Rows, device: torch.device) -> None:
    """Give every parameter memory for this rank's rows, and the rows."""
    # Tied parameters stay tied: torch swaps the contents of a DTensor and keeps the object.
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), "fully_shard left a parameter whole"
        mesh = parameter.device_mesh
        span = Span.of(parameter.shape[0], mesh.get_local_rank(), mesh.size())
        if span.start < span.stop:
            parameter.to_local().copy_(rows(name, span.start, span.stop))


def settle(model: nn.Module, precision: Precision, device: torch.device) -> None:
    """One pass over a single token. Collective.

    In its first pass `fully_shard` reads from what trains in which format each group's gradients are reduced. An
    optimizer may narrow what trains, so that pass must be over before there is one.
    """
    base = causal_lm(model)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    with evaluating(base), torch.no_grad(), autocast(base, precision):
        base(input_ids=token, use_cache=False)
    rest(model)


def rest(model: nn.Module) -> None:
    """Let go of what the last pass gathered: after one without a backward pass, what stands outside the layers."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _as_fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


def _shares(part: nn.Module, model: nn.Module) -> bool:
    """Whether a parameter of `part` is also one of another module."""
    own = {id(parameter) for parameter in part.parameters()}
    inside = set(part.modules())
    return any(
        id(parameter) in own
        for module in model.modules()
        if module not in inside
        for parameter in module.parameters(recurse=False)
    )
