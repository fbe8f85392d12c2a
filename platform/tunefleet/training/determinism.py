"""Everything that makes two runs of the same recipe the same run, on one machine and one thread count."""

from __future__ import annotations

import random

import numpy as np
import torch

_RANK_STRIDE = 1_000_003
"""Distance between the seeds of two ranks. A prime, so that seeds of neighbouring runs do not meet."""


def seed_everything(seed: int, rank: int) -> None:
    """Seed torch, NumPy and Python. Ranks get different streams (their dropout differs), each a pure function."""
    own = seed + rank * _RANK_STRIDE
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def pin(threads: int | None = None) -> None:
    """Ask torch for kernels whose result does not depend on scheduling, on a CPU, and fix the thread count.

    Args:
        threads: threads of one operation; None leaves torch's choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        return
    torch.use_deterministic_algorithms(True)
    # The same switch would also fill every fresh tensor with NaN, a debugging aid that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
