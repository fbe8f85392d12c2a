"""The flat tensors that DeepSpeed's optimizers keep on a rank: the one place that knows their names.

Legend: a master is a flat tensor that holds this rank's part of a group of parameters in the format that they are
updated in; the optimizer's state has its shape. Stages 1 and 2 part the group as a whole, so each rank has a run of it;
stage 3 parts each parameter, so each rank has a run of every one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Wrapped = Any
"""DeepSpeed's optimizer around ours. Its classes are not annotated."""


def is_shared_out(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has parted a parameter: this rank holds `ds_tensor`, and `data` is whole only now and then."""
    return hasattr(parameter, "ds_tensor")


def part_of(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter, flat; the parameter itself where it is not parted."""
    foreign: Any = parameter
    part: Tensor = foreign.ds_tensor if is_shared_out(parameter) else parameter
    return part.detach()


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, parted or not."""
    foreign: Any = parameter
    return torch.Size(foreign.ds_shape if is_shared_out(parameter) else parameter.shape)


def put_in_shape(parameter: nn.Parameter) -> None:
    """Give a parted parameter its shape: one entry, expanded, which takes no memory."""
    parameter.data = parameter.data.new_zeros(()).expand(whole_shape(parameter))


@contextmanager
def in_shape(model: nn.Module) -> Iterator[None]:
    """Let parted parameters have their shapes, though not their values, so that methods can read the structure.

    Where values are needed, `AttachContext.gather` brings them.
    """
    parted = [parameter for parameter in model.parameters() if is_shared_out(parameter)]
    for parameter in parted:
        put_in_shape(parameter)
    try:
        yield
    finally:
        for parameter in parted:
            parameter.data = parameter.data.new_empty(0)


def masters(wrapped: Wrapped) -> list[Tensor]:
    """What our optimizer updates on this rank, in the order of its groups."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        found: list[Tensor] | None = getattr(wrapped, name, None)
        if found is not None:
            return found
    raise TypeError(f"DeepSpeed's {type(wrapped).__name__} keeps its masters where this version does not look")


def put_masters_into_weights(wrapped: Wrapped, stage: int) -> None:
    """Write masters that were loaded into the weights, on all ranks. Collective."""
    if stage < 3:
        wrapped.update_lp_params()
        return
    for master, weights in zip(masters(wrapped), wrapped.fp16_partitioned_groups_flat, strict=True):
        weights.data.copy_(master.data)


def forget_gradients(wrapped: Wrapped) -> None:
    """Clear the parts that ZeRO-3 adds gradients up in.

    DeepSpeed leaves them: a parameter that the next update does not touch would be stepped by its old gradient.
    """
    buffer: Tensor | None = getattr(wrapped, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()


def forget_whole_copies(wrapped: Wrapped) -> None:
    """Part the parameters that ZeRO-3 keeps whole (small ones), so that `part_of` is the only truth. Collective."""
    wrapped.parameter_offload.partition_all_parameters()


def renew_whole_copies(wrapped: Wrapped) -> None:
    """Gather them again, from the parts as they are now. Collective."""
    kept: list[Any] = wrapped.persistent_parameters
    if kept:
        kept[0].all_gather(kept)


def state_of(optimizer: Optimizer, wrapped: Wrapped) -> list[dict[str, Any]]:
    """The optimizer's state of each master, tensors and plain numbers."""
    return [dict(optimizer.state.get(master, {})) for master in masters(wrapped)]
