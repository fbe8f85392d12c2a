"""A run at Weights & Biases: at its server, or with WANDB_MODE=offline in files that `wandb sync` takes there."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunefleet.artifacts.trackers.tracker import LOADING, End, TrackedRun

if TYPE_CHECKING:
    import wandb

PROJECT = "tunefleet"
_STEPS = {"train/*": "train/step", "workers/*": "train/step", "eval/*": "eval/step"}
"""The step of each family of curves, in columns of their own: the server's own counter refuses to go back."""


class WandbRun:
    """One of our runs as a run of W&B's.

    At the server a resumed run goes on behind the last step that the server has. Offline there is nobody to ask, and
    what the client had not yet written when it was killed is lost; so, like our TensorBoard events, the files of each
    attempt hold the whole run, and those of the attempt before are removed. Files that were synced are left alone.
    """

    name = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._reached: dict[str, int] = {}
        self._open: wandb.Run | None = None

    def open(self) -> None:
        if self._open is not None:
            return  # the client has its own ways to come back to a server
        with LOADING:
            import wandb

        run_id = self._run.tracked_as(self.name) or uuid.uuid4().hex[:8]
        self._run.keep(self.name, run_id)
        folder = Path(os.environ.get("WANDB_DIR", self._run.folder))
        offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        if offline:
            _remove_earlier(folder, run_id)
        opened = self._open = wandb.init(
            id=run_id,
            resume="allow",
            reinit="create_new",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._run.name,
            dir=str(folder),
            config=dict(self._run.config),
            # The client would also keep the worker's command line, which is Ray's, and what it prints.
            settings=wandb.Settings(console="off", silent=True, save_code=False, x_disable_meta=True),
        )
        for curves, step in _STEPS.items():
            opened.define_metric(curves, step_metric=step)
        self._reached = {} if offline else {step: int(opened.summary.get(step, -1)) for step in _STEPS.values()}

    def reached(self, curve: str) -> int:
        return self._reached.get(_step_of(curve), -1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._open is None:
            raise AssertionError("written before it was opened")
        own = {_step_of(curve): step for curve in numbers}
        self._open.log({**own, **numbers})
        self._reached |= own

    def close(self, end: End) -> None:
        if self._open is not None:
            self._open.finish(exit_code=0 if end == "finished" else 1)


def _step_of(curve: str) -> str:
    return "eval/step" if curve.startswith("eval/") else "train/step"


def _remove_earlier(folder: Path, run_id: str) -> None:
    """Remove the files of earlier attempts that no server has seen."""
    for earlier in folder.glob(f"wandb/offline-run-*-{run_id}"):
        if not any(earlier.glob("*.synced")):
            shutil.rmtree(earlier)
