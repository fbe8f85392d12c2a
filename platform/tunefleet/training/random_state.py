"""The random state of one process as bytes of a fixed length, so that ranks can exchange it without pickle."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

_WORDS = 624
"""State words of a Mersenne twister, which NumPy's legacy generator and Python's `random` both are."""


def capture(model: nn.Module) -> Tensor:
    """Torch (CPU, and the GPU that `model` is on), NumPy and Python random state: one uint8 tensor."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, words, python_gauss = random.getstate()
    no_gauss = float("nan")
    numpy_part = np.concatenate([np.asarray(keys, np.float64), [position, has_gauss, gauss]])
    python_part = np.array([*words, no_gauss if python_gauss is None else python_gauss], np.float64)
    # Every 32-bit word is exact in a float64, and so are the Gaussian values kept for a second draw.
    own = torch.from_numpy(np.concatenate([numpy_part, python_part]).view(np.uint8).copy())
    return torch.cat([own, torch.get_rng_state(), *_device_state(model)])


def restore(state: Tensor, model: nn.Module) -> None:
    """Put back what `capture` returned.

    Raises:
        RuntimeError: the bytes are not such a state.
    """
    own_bytes = 8 * (_WORDS + 3 + _WORDS + 1 + 1)
    cpu_bytes = torch.get_rng_state().numel()
    if state.numel() < own_bytes + cpu_bytes:
        raise RuntimeError("the random state is too short")
    numbers = state[:own_bytes].numpy().copy().view(np.float64)
    numpy_part, python_part = numbers[: _WORDS + 3], numbers[_WORDS + 3 :]
    keys = numpy_part[:_WORDS].astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(numpy_part[-3]), int(numpy_part[-2]), float(numpy_part[-1])))
    gauss = None if np.isnan(python_part[-1]) else float(python_part[-1])
    random.setstate((3, tuple(int(word) for word in python_part[:-1]), gauss))
    torch.set_rng_state(state[own_bytes : own_bytes + cpu_bytes].clone())
    device = next(model.parameters()).device
    if device.type == "cuda" and state.numel() > own_bytes + cpu_bytes:
        torch.cuda.set_rng_state(state[own_bytes + cpu_bytes :].clone(), device)


def _device_state(model: nn.Module) -> list[Tensor]:
    device = next(model.parameters()).device
    return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
