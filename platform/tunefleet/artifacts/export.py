"""A whole model out of a trained folder, for everyone who loads models and knows no adapters."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import torch
from torch import nn

from tunefleet.artifacts.assemble import find_parts, load_parts, load_parts_tokenizer
from tunefleet.errors import Refused

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(source: Path, to: Path, *, dtype: str | None = None, base: str | None = None) -> Path:
    """Write model and tokenizer of a trained folder, every adapter merged, so that plain transformers loads them.

    Args:
        source: the output_dir of a finished run, an adapter, or a whole model.
        to: a new or empty folder; it appears when it is complete.
        dtype: number format of the weights; None keeps the base's own.
        base: the base model, where it is not what the adapter names.

    Returns:
        `to`.

    Raises:
        Refused: `to` holds something, the number format is unknown, or a part is missing or does not fit.
    """
    if dtype is not None and dtype not in DTYPES:
        raise Refused(f"dtype {dtype} is unknown: choose {', '.join(DTYPES)}, or leave it out.")
    to = to.expanduser()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Refused(f"{to} is not empty: name a new folder.")
    parts = find_parts(source, base)
    model, tokenizer = load_parts(parts), load_parts_tokenizer(parts)
    if dtype is not None:
        nn.Module.to(model, DTYPES[dtype])
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.parent / f".{to.name}.tmp-{uuid.uuid4().hex}"
    try:
        model.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
        temporary.replace(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return to
