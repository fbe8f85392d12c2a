"""Hashes that say whether two states are the same bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

CHUNK_BYTES = 8 * 2**20


def fingerprint(state: object) -> str:
    """SHA-256 of nested mappings and sequences of tensors, arrays and plain values; 64 hexadecimal digits.

    The order of keys does not count; data types and shapes do, where a tensor lies and its strides do not.

    Raises:
        TypeError: something else is inside.
    """
    digest = hashlib.sha256()
    _absorb(state, digest)
    return digest.hexdigest()


def _absorb(state: object, digest: hashlib._Hash) -> None:
    import numpy as np
    import torch

    # Every value is led in by its kind and size, so that no two states write the same bytes.
    if isinstance(state, torch.Tensor):
        digest.update(f"tensor {state.dtype} {tuple(state.shape)};".encode())
        flat = state.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(state, np.ndarray):
        digest.update(f"array {state.dtype} {state.shape};".encode())
        digest.update(np.ascontiguousarray(state).tobytes())
    elif isinstance(state, Mapping):
        digest.update(f"mapping {len(state)};".encode())
        for key in sorted(state, key=repr):
            _absorb(key, digest)
            _absorb(state[key], digest)
    elif isinstance(state, list | tuple):
        digest.update(f"sequence {len(state)};".encode())
        for one in state:
            _absorb(one, digest)
    elif state is None or isinstance(state, bool | int | float | str | bytes):
        text = repr(state)
        digest.update(f"{type(state).__name__} {len(text)} {text};".encode())
    else:
        raise TypeError(f"{type(state).__name__} has no fingerprint; keep tensors, arrays and plain values in a state")


def folder_fingerprint(folder: Path, pattern: str = "*") -> str:
    """SHA-256 over names and contents of the files right in a folder that match; for a base model on disk."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob(pattern)):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size};".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()
