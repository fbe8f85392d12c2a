"""What every engine that runs over the ranks of `torch.distributed` does in the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tunefleet.errors import Refused

_T = TypeVar("_T")


class Ranks:
    """This process among the others, and the small exchanges between them."""

    def __init__(self, device: torch.device) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1
        self.bytes_counted = 0
        self._device = device

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank has handed to collectives so far."""
        return self.bytes_counted

    def total(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over the ranks. Collective."""
        values = values.to(self._device)
        if self.world > 1:
            dist.all_reduce(values)
            self.bytes_counted += values.numel() * values.element_size()
        return values.cpu()

    def gather(self, data: Tensor) -> list[Tensor]:
        """Every rank's copy of a byte tensor of one common length, by rank. Collective."""
        if self.world == 1:
            return [data]
        data = data.to(self._device)
        gathered = [torch.empty_like(data) for _ in range(self.world)]
        dist.all_gather(gathered, data)
        self.bytes_counted += data.numel() * data.element_size()
        return [piece.cpu() for piece in gathered]

    def read_together(self, read: Callable[[], _T]) -> _T:
        """What `read` makes of files, once it has read them on every rank. Collective.

        Raises:
            Refused: here or on another rank; on all of them, so that none waits for one that has given up.
        """
        found: Any = None
        refusal: Refused | None = None
        try:
            found = read()
        except Refused as error:  # raised again below, once every rank knows
            refusal = error
        refused = self.gather(torch.tensor([refusal is not None], dtype=torch.uint8))
        if refusal is not None:
            raise refusal
        for rank, flag in enumerate(refused):
            if flag.item():
                raise Refused(f"Worker {rank} cannot read its part of the checkpoint: resume from another checkpoint.")
        own: _T = found
        return own

    def _share(self, tensor: Tensor) -> None:
        """Make a tensor that of rank 0, as bytes, so that every dtype arrives unchanged. Collective."""
        if self.world == 1:
            return
        data = tensor.detach().contiguous()
        flat = data.reshape(-1).view(torch.uint8)
        dist.broadcast(flat, src=0)
        self.bytes_counted += flat.numel()
        if data.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(data)
