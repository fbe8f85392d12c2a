"""The lines of `metrics.jsonl`: one object for each logged step, and one for each evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from tunefleet.storage import place

METRICS = "metrics.jsonl"
Line = dict[str, int | float | None]
# Fields that differ between two runs of the same recipe; all others are equal bit for bit on the same machine.
TIMING_FIELDS = frozenset({"seconds", "tokens_per_second", "mfu"})


def read_metrics(file: Path) -> list[Line]:
    """Every whole line, up to the first that is torn (a killed writer leaves one at the end)."""
    lines: list[Line] = []
    if not file.is_file():
        return lines
    for text in file.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not text.endswith(b"\n") or not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def rewind(file: Path, step: int) -> list[Line]:
    """Keep the lines up to `step`, in the file and as the result."""
    lines = [line for line in read_metrics(file) if (line["step"] or 0) <= step]
    place(file).write_text("".join(dump(line) for line in lines))
    return lines


def dump(line: Mapping[str, int | float | None]) -> str:
    """One line of JSON. What is not finite becomes null, which every JSON reader knows."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
    return json.dumps(finite) + "\n"
