"""`output_dir`: the driver's own copy of what a run leaves, and whose files it may write over."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.metrics import METRICS
from tunefleet.artifacts.report import loss_plot
from tunefleet.errors import Refused
from tunefleet.storage import Place
from tunefleet.stores import StoreFailed

_MARKER = "run.json"
"""The file of an output folder that names the run which wrote it."""

_TRIAL_SECONDS = 15.0
"""Patience of a command that has not begun: its store is not down for a moment, it is named wrongly."""


def refuse_unwritable(folder: Path, key: str) -> None:
    """See that a folder can be written to, now rather than after the training. Makes it.

    Raises:
        Refused: it cannot, named by the key of the recipe that led there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(f"{key}: {folder} cannot be written to ({error.strerror}): choose another {key}.") from error


def refuse_unusable(storage: Place, key: str) -> None:
    """See that a store behind a URI can be written to and deleted from, now rather than at the first checkpoint.

    Raises:
        Refused: it cannot, named by the key of the recipe that led there.
    """
    if storage.local_path is not None:  # nothing is made on a disk before the recipe has been looked at
        return
    try:
        storage.try_out(_TRIAL_SECONDS)
    except (OSError, StoreFailed) as error:
        raise Refused(f"{key}: {error}") from error


def refuse_foreign_output(
    output_dir: Path,
    folder: RunFolder,
    overwrite: bool,
    *,
    key: str = "output_dir",
    permit: str = "write overwrite_output_dir: true",
) -> None:
    """Leave files alone that this run has not written.

    Args:
        key: what names the folder, for the sentence.
        permit: what lets the files be written over, for the sentence.

    Raises:
        Refused: the folder holds files of something else.
    """
    if overwrite or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if _writer(output_dir) != folder.root.uri:
        raise Refused(
            f"{key} {output_dir} holds files of something else: choose another {key}, or {permit} to write over them."
        )


def refuse_output(
    output_dir: Path,
    folder: RunFolder,
    overwrite: bool,
    *,
    key: str = "output_dir",
    permit: str = "write overwrite_output_dir: true",
) -> None:
    """See that a run may write to a folder, and can. Makes it. Arguments as in `refuse_foreign_output`.

    Raises:
        Refused: it holds files of something else, or cannot be written to.
    """
    refuse_foreign_output(output_dir, folder, overwrite, key=key, permit=permit)
    refuse_unwritable(output_dir, key)


def _writer(output_dir: Path) -> str | None:
    """The run that wrote the files of a folder; None where that cannot be told."""
    try:
        marker = json.loads((output_dir / _MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker.get("run") if isinstance(marker, dict) else None


def bring_home(folder: RunFolder, output_dir: Path, plot: bool) -> None:
    """Copy model and record to the driver's disk and draw the loss."""
    output_dir.mkdir(parents=True, exist_ok=True)
    folder.model.download(output_dir)
    folder.record.download(output_dir)
    mark(output_dir, folder.root.uri)
    if plot:
        loss_plot(output_dir / METRICS, output_dir / "loss.png")


def mark(output_dir: Path, run: str) -> None:
    """Say which run, or search, wrote a folder's files."""
    (output_dir / _MARKER).write_text(json.dumps({"run": run}))
