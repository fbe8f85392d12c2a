"""The checkpoints of a run, as folders in its storage: their names, the newest that is whole, which of them go."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tunefleet.errors import Refused
from tunefleet.storage import STALE_NAME, Damaged, Place

STEP_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """The folder name of a checkpoint after `step` updates."""
    return f"step_{step:08d}"


def step_of(checkpoint: Place) -> int:
    """The number of updates behind a checkpoint, from its name.

    Raises:
        Refused: the name is not one that `step_name` gives.
    """
    match = STEP_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise Refused(f"{checkpoint.uri} is not a checkpoint; name a folder such as {step_name(100)}.")
    return int(match[1])


def newest_complete(checkpoints: Place, *, hashes: bool = False) -> tuple[Place | None, list[str]]:
    """Find the newest whole checkpoint, and a notice for each newer one that had to be skipped.

    Sizes are always compared. `hashes` reads the contents too: for who loads from `local_path` without a download.
    """
    notices: list[str] = []
    for checkpoint in reversed(_steps(checkpoints)):
        problem = checkpoint.problem(hashes=hashes)
        if problem is None:
            return checkpoint, notices
        notices.append(f"The checkpoint {checkpoint.uri} is skipped: {problem}.")
    return None, notices


def download_newest(checkpoints: Place, to: Path) -> tuple[Place | None, list[str]]:
    """Copy the newest checkpoint whose sizes and hashes hold to an empty or missing local folder."""
    notices: list[str] = []
    for checkpoint in reversed(_steps(checkpoints)):
        problem = checkpoint.problem()
        if problem is None:
            try:
                checkpoint.download(to)
                return checkpoint, notices
            except Damaged as damage:
                problem = str(damage)
                shutil.rmtree(to)
        notices.append(f"The checkpoint {checkpoint.uri} is skipped: {problem}.")
    return None, notices


def to_delete(names: Sequence[str], keep: int | None, best: str | None) -> list[str]:
    """Decide which checkpoints go: all but the newest `keep`, among which `best` takes a place of its own.

    The newest stays in any case, so with `keep` 1 and another one the best, two stay.

    Raises:
        Refused: `keep` is below 1.
    """
    if keep is None:
        return []
    if keep < 1:
        raise Refused(f"save_total_limit is {keep}; give at least 1, or leave it out to keep every checkpoint.")
    ordered = sorted(names, key=_number)
    newest = ordered[-keep:]
    if best is not None and best in ordered and best not in newest:
        newest = [best, *ordered[-max(keep - 1, 1) :]]
    return [name for name in ordered if name not in newest]


def prune(checkpoints: Place, keep: int | None, best: str | None) -> list[str]:
    """Delete what `to_delete` says and what killed writers left; returns the names that went.

    Only the writer of the run calls this, after its upload: whatever has a temporary name then is stale. A damaged
    checkpoint counts for nothing: it goes once a newer one is whole, where there is a limit at all.
    """
    stale = [child.name for child in checkpoints.children() if STALE_NAME.fullmatch(child.name)]
    steps = _steps(checkpoints)
    whole = [step.name for step in steps if step.problem() is None]
    gone = to_delete(whole, keep, best)
    if keep is not None and whole:
        gone += [step.name for step in steps if step.name not in whole and step_of(step) < max(map(_number, whole))]
    for name in stale + gone:
        checkpoints.child(name).delete()
    return stale + gone


def forget_after(checkpoints: Place, step: int) -> list[str]:
    """Delete the checkpoints behind `step`, for a run that goes another way from there; returns their names."""
    gone = [checkpoint for checkpoint in _steps(checkpoints) if step_of(checkpoint) > step]
    for checkpoint in gone:
        checkpoint.delete()
    return [checkpoint.name for checkpoint in gone]


def _number(name: str) -> int:
    return int(name.removeprefix("step_"))


def _steps(checkpoints: Place) -> list[Place]:
    return sorted((one for one in checkpoints.children() if STEP_NAME.fullmatch(one.name)), key=step_of)
