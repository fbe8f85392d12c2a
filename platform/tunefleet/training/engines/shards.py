"""Tensors whose rows are shared out over ranks, in files that any number of ranks can read back.

Each rank writes one safetensors file, `stem-00001-of-00004.safetensors` being rank 1's of four. Its metadata say which
rows of which whole tensor each entry is, so that a rank of another world finds the rows it needs in everyone's files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunefleet.training.files import read

_METADATA = "shards"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's number formats by the names that safetensors has for them."""


@dataclass(frozen=True)
class Span:
    """The rows that a rank holds of a tensor: like `torch.chunk`, the first ranks have full chunks."""

    start: int
    stop: int
    chunk: int
    """Rows of a full chunk."""

    @classmethod
    def of(cls, rows: int, rank: int, world: int) -> Span:
        chunk = -(-rows // world)
        return cls(min(rank * chunk, rows), min((rank + 1) * chunk, rows), chunk)


@dataclass(frozen=True)
class Shard:
    """A rank's rows of a tensor."""

    local: Tensor
    start: int
    """The first of them in the whole tensor."""
    whole: tuple[int, ...]
    """Shape of the whole tensor."""


def shard_file(folder: Path, stem: str, rank: int, world: int) -> Path:
    """Where a rank of so many writes."""
    return folder / f"{stem}-{rank:05d}-of-{world:05d}.safetensors"


def save_shards(shards: Mapping[str, Shard], path: Path) -> None:
    """Write a rank's rows of every tensor."""
    places = {name: [shard.start, *shard.whole] for name, shard in shards.items()}
    save_file(
        {name: shard.local.detach().cpu().contiguous().clone() for name, shard in shards.items()},
        path,
        metadata={_METADATA: json.dumps(places)},
    )


def load_shards(folder: Path, stem: str, wanted: Mapping[str, Shard]) -> None:
    """Copy the rows of `wanted` out of whatever files hold them.

    Raises:
        Refused: a file is missing or damaged.
        ValueError: they hold tensors of other names, shapes or dtypes, or other rows than that rank's.
    """
    files = _files(folder, stem)
    for rank, path in enumerate(files):
        stored = read(path, _described)
        if odd := sorted(stored.keys() ^ wanted.keys()):
            raise ValueError(f"{len(odd)} tensors are not in both, the first is {odd[0]}")
        for name, shard in wanted.items():
            if (stored[name].whole, stored[name].dtype) != (shard.whole, shard.local.dtype):
                raise ValueError(f"{name} has another shape or dtype")
            own = Span.of(shard.whole[0], rank, len(files))
            if (stored[name].start, stored[name].rows) != (own.start, own.stop - own.start):
                raise ValueError(f"{path.name} holds other rows of {name} than its name says")
        overlaps = {name: _overlap(stored[name], shard) for name, shard in wanted.items()}
        read(path, partial(_copy, wanted=wanted, overlaps=overlaps))


@dataclass(frozen=True)
class Stored:
    """An entry of a file."""

    start: int
    rows: int
    whole: tuple[int, ...]
    dtype: torch.dtype


def stored_shards(folder: Path, stem: str) -> dict[str, Stored]:
    """The entries of one of the files; whole shapes and dtypes are the same in all of them.

    Raises:
        Refused: it is missing or damaged.
    """
    return read(_files(folder, stem)[0], _described)


def _described(path: Path) -> dict[str, Stored]:
    with safe_open(path, framework="pt") as file:
        places: dict[str, list[int]] = json.loads(file.metadata()[_METADATA])
        found = {}
        for name, (start, *whole) in places.items():
            entry = file.get_slice(name)
            found[name] = Stored(start, entry.get_shape()[0], tuple(whole), DTYPES[entry.get_dtype()])
        return found


def _files(folder: Path, stem: str) -> list[Path]:
    """The files of all ranks that wrote, whichever of them are there."""
    counts = [re.search(r"-of-(\d+)\.safetensors$", path.name) for path in folder.glob(f"{stem}-*-of-*.safetensors")]
    world = max((int(count[1]) for count in counts if count), default=1)
    return [shard_file(folder, stem, rank, world) for rank in range(world)]


def _overlap(stored: Stored, shard: Shard) -> tuple[int, int]:
    """The rows of the whole tensor that both have: first, and last but one."""
    first = max(stored.start, shard.start)
    return first, max(first, min(stored.start + stored.rows, shard.start + len(shard.local)))


def _copy(path: Path, wanted: Mapping[str, Shard], overlaps: Mapping[str, tuple[int, int]]) -> None:
    with safe_open(path, framework="pt") as file:
        places: dict[str, list[int]] = json.loads(file.metadata()[_METADATA])
        for name, (first, last) in overlaps.items():
            if first < last:
                start, shard = places[name][0], wanted[name]
                shard.local[first - shard.start : last - shard.start] = file.get_slice(name)[
                    first - start : last - start
                ]
