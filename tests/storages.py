"""What tensors really hold in memory."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the unique storages behind the tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
