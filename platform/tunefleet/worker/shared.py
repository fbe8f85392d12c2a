"""What the trials of a node begin from alike: factors that a method makes of the base model, made once.

PiSSA factorises every target, for seconds or minutes. The factors depend on the method's own keys, the seed and the
number formats, and not on learning rate or schedule, so that most trials of a search find them here, memory-mapped. A
trial that takes them is bit for bit the one that would have made them: it is how a resumed run begins as well.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tunefleet.plan import Plan


@dataclass(frozen=True)
class SharedStart:
    """The factors of one kind of trial, in a folder that trials of one base model share."""

    folder: Path
    plan: Plan

    @property
    def file(self) -> Path:
        """Where they are, once somebody has made them."""
        recipe, workers = self.plan.recipe, self.plan.workers
        alike = [
            recipe.method.name,
            recipe.method.model_dump(mode="json"),
            recipe.model.model_dump(mode="json"),
            recipe.training.seed,
            self.plan.precision.model_dump(mode="json"),
            [workers.device, workers.threads],  # sums differ in their last bits
        ]
        return self.folder / f"{hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()}.safetensors"

    def read(self) -> dict[str, Tensor] | None:
        """What another trial has left; None where it is still to be made."""
        return load_file(self.file) if self.file.exists() else None

    def leave(self, initial: Mapping[str, Tensor]) -> None:
        """Leave it for others, whole or not at all. Methods that make nothing leave nothing."""
        if not initial or self.file.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{uuid.uuid4().hex}.part"
        save_file({name: value.detach().cpu().contiguous() for name, value in initial.items()}, part)
        part.replace(self.file)
