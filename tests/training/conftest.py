"""One thread and deterministic kernels, as a worker has them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# So that `tests.training.tiny` can be imported, here and by the processes that these tests start.
sys.path.append(str(Path(__file__).resolve().parents[2]))


@pytest.fixture(autouse=True)
def pinned() -> Iterator[None]:
    from tunefleet.training.determinism import pin

    threads = torch.get_num_threads()
    pin(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
