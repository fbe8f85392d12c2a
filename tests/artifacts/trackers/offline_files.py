"""Reads what W&B's client writes offline: LevelDB's log format behind a header of its own, a protobuf a record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_MESSAGES: Any = wandb_internal_pb2  # its classes are made when it is imported
_BLOCK, _HEADER, _FULL, _FIRST, _LAST = 2**15, 7, 1, 2, 4


def records(file: Path) -> Iterator[Any]:
    """Every whole record."""
    data, position, parts = file.read_bytes(), _HEADER, b""
    while position + _HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER:  # too little is left of the block for another header
            position += _BLOCK - position % _BLOCK
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield _MESSAGES.Record.FromString(parts)


def rows(file: Path) -> list[dict[str, Any]]:
    """The history: what was logged, without W&B's own columns."""
    found = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append({key: value for key, value in items.items() if not key.startswith("_")})
    return found


def config(file: Path) -> dict[str, Any]:
    """What the run was configured with."""
    for record in records(file):
        if record.WhichOneof("record_type") == "run":
            return {update.key: json.loads(update.value_json) for update in record.run.config.update}
    return {}
