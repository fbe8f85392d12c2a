"""What every engine that runs over the ranks of `torch.distributed` does in the same way."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process among the others, and the small exchanges between them."""

    def __init__(self, device: torch.device) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1
        self.bytes_sent = 0
        self._device = device

    def total(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over the ranks. Collective."""
        values = values.to(self._device)
        if self.world > 1:
            dist.all_reduce(values)
            self.bytes_sent += values.numel() * values.element_size()
        return values.cpu()

    def gather(self, data: Tensor) -> list[Tensor]:
        """Every rank's copy of a byte tensor of one common length, by rank. Collective."""
        if self.world == 1:
            return [data]
        data = data.to(self._device)
        gathered = [torch.empty_like(data) for _ in range(self.world)]
        dist.all_gather(gathered, data)
        self.bytes_sent += data.numel() * data.element_size()
        return [piece.cpu() for piece in gathered]

    def _share(self, tensor: Tensor) -> None:
        """Make a tensor that of rank 0, as bytes, so that every dtype arrives unchanged. Collective."""
        if self.world == 1:
            return
        data = tensor.detach().contiguous()
        flat = data.reshape(-1).view(torch.uint8)
        dist.broadcast(flat, src=0)
        self.bytes_sent += flat.numel()
        if data.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(data)
