"""Tensors and plain numbers to and from files, and their fingerprints. Nothing that is read can run code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunefleet.errors import LONGEST_REASON, Refused, first_line

_T = TypeVar("_T")

_DAMAGE = (OSError, TypeError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError, SafetensorError)
"""What the readers of the formats raise when bytes are missing or wrong."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    # Clones, because safetensors refuses tensors that share storage, as an architecture's buffers may.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        Refused: it is missing or damaged.
    """
    return read(path, load_file)


def load_pickle(path: Path) -> dict[str, Any]:
    """Read a dict of tensors and plain numbers that `torch.save` wrote, with `weights_only=True`.

    Raises:
        Refused: it is missing or damaged.
    """
    return read(path, _load_dict)


def _load_dict(path: Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError("it holds no optimizer state")
    return state


def read(path: Path, reader: Callable[[Path], _T]) -> _T:
    """What `reader` makes of a file of a checkpoint.

    Raises:
        Refused: the file is missing or damaged.
    """
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise Refused(f"The checkpoint file {path} is missing: resume from another checkpoint.") from error
    except _DAMAGE as error:
        said = first_line(error, LONGEST_REASON)
        raise Refused(f"The checkpoint file {path} is damaged ({said}): resume from another checkpoint.") from error


def digest(value: object) -> str:
    """SHA-256 of nested mappings and lists of tensors (dtype, shape, strides, bytes) and plain values, by key."""
    found = hashlib.sha256()
    for name, item in _flatten("", value):
        found.update(name.encode())
        if isinstance(item, Tensor):
            data = item.detach().cpu().contiguous()
            found.update(f"{data.dtype}{tuple(data.shape)}{tuple(item.stride())}".encode())
            found.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(item).encode())
    return found.hexdigest()


def _flatten(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _flatten(f"{prefix}/{key}", value[key])
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _flatten(f"{prefix}/{position}", item)
    else:
        yield prefix, value
