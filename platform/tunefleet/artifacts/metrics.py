"""The lines of `metrics.jsonl`: one object for each logged step, and one for each evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunefleet.storage import place

METRICS = "metrics.jsonl"
Line = dict[str, Any]
"""Numbers by name, None where there is none; and `workers`: for each figure a list, one number for each rank."""
WORKERS = "workers"
# Fields that differ between two runs of the same recipe; all others are equal bit for bit on the same machine.
TIMING_FIELDS = frozenset({"seconds", "tokens_per_second", "mfu", WORKERS})


def read_metrics(file: Path) -> list[Line]:
    """Every whole line of a file; none where there is no file."""
    return metrics_of(file.read_bytes()) if file.is_file() else []


def metrics_of(content: bytes) -> list[Line]:
    """Every whole line, up to the first that is torn (a killed writer leaves one at the end)."""
    lines: list[Line] = []
    for text in content.splitlines(keepends=True):
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


def dump(line: Mapping[str, Any]) -> str:
    """One line of JSON. What is not finite becomes null, which every JSON reader knows."""
    return json.dumps({key: _finite(value) for key, value in line.items()}) + "\n"


def scalars(line: Line) -> dict[str, int | float]:
    """Every number of a line under a name of its own, as trackers want them; the step and what is None left out.

    A training line's are `train/...`, an evaluation's `eval/...`, and a rank's `workers/<figure>/rank_<rank>`.
    """
    family = family_of(line)
    numbers = {f"{family}/{key.removeprefix('eval_')}": value for key, value in line.items() if key != WORKERS}
    for figure, values in line.get(WORKERS, {}).items():
        numbers |= {f"workers/{figure}/rank_{rank}": value for rank, value in enumerate(values)}
    no_curves = ("train/step", "train/seconds", "eval/step", "eval/epoch")
    return {key: value for key, value in numbers.items() if value is not None and key not in no_curves}


def family_of(line: Line) -> str:
    """`train` or `eval`: what the line is of. Each family has a step at most once."""
    return "eval" if "eval_loss" in line else "train"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
