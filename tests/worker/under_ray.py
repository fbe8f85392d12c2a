"""Runs under Ray Train that something happens to, and what their records say afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.worker.alone import run_alone

from tunefleet.artifacts.metrics import TIMING_FIELDS, read_metrics
from tunefleet.artifacts.record import read_attempts
from tunefleet.launch.draft import Stages
from tunefleet.launch.train import Outcome, train
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import Recipe
from tunefleet.worker.events import Event

UPDATES, SAVE_STEPS = 60, 20

GALORE: dict[str, object] = {
    "finetuning_type": "full",
    "use_galore": True,
    "galore_rank": 8,
    "galore_scale": 1.0,
    "galore_update_interval": 7,
}
# Visits end neither where checkpoints are nor where workers are killed; a round is over before the first checkpoint.
BADAM: dict[str, object] = {
    "finetuning_type": "full",
    "use_badam": True,
    "badam_switch_interval": 3,
    "badam_include_embedding": True,
    "badam_include_lm_head": True,
}
RATIO: dict[str, object] = {**BADAM, "badam_mode": "ratio", "badam_update_ratio": 0.15}

METHODS: dict[str, dict[str, object]] = {
    "full": {"finetuning_type": "full"},
    "full_zero3": {"finetuning_type": "full", "deepspeed": "zero3"},
    "lora_zero2": {"finetuning_type": "lora", "lora_dropout": 0.1, "deepspeed": "zero2"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "lora_dropout": {"finetuning_type": "lora", "lora_dropout": 0.2},
    "dora": {"finetuning_type": "lora", "use_dora": True},
    "full_fsdp2": {"finetuning_type": "full", "sharding": "fsdp2"},
    "lora_fsdp2": {"finetuning_type": "lora", "lora_dropout": 0.2, "sharding": "fsdp2"},
    "badam_fsdp2": BADAM | {"pure_bf16": True, "bf16": None, "sharding": "fsdp2"},
    "pissa": {"finetuning_type": "lora", "pissa_init": True, "lora_dropout": 0.1},
    "galore": GALORE,
    "galore_layerwise": GALORE
    | {"galore_layerwise": True, "galore_proj_type": "full", "bf16": None, "pure_bf16": True},
    "galore_svd": GALORE | {"galore_refresh": "svd", "galore_stagger": True},
    "galore_reverse_std": GALORE | {"galore_proj_type": "reverse_std"},
    "galore_right": GALORE | {"galore_proj_type": "right", "galore_refresh": "eigh"},
    "galore_left": GALORE
    | {"galore_proj_type": "left", "bf16": None, "pure_bf16": True, "bf16_rounding": "stochastic"},
    "galore_full": GALORE | {"galore_proj_type": "full"},
    "badam_ascending": BADAM | {"pure_bf16": True, "bf16": None},
    "badam_zero3": BADAM | {"pure_bf16": True, "bf16": None, "deepspeed": "zero3"},
    "badam_descending": BADAM | {"badam_switch_mode": "descending"},
    "badam_random": BADAM | {"badam_switch_mode": "random", "badam_start_block": 1},
    "badam_fixed": BADAM | {"badam_switch_mode": "fixed", "badam_start_block": 2},
    "badam_adjacent": RATIO,
    "badam_scatter": RATIO | {"badam_mask_mode": "scatter", "pure_bf16": True, "bf16": None},
}


@dataclass
class Watching:
    """A display that hands every event to a function."""

    react: Callable[[Event], None] | None = None
    events: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @contextmanager
    def preparing(self) -> Iterator[Stages]:
        yield lambda *_: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, event: Event) -> None:
        self.events.append(event)
        if self.react is not None:
            self.react(event)


@dataclass(frozen=True)
class World:
    """Where the runs of a test happen."""

    folder: Path
    model: Path
    data: Path
    address: str

    def keys(self, name: str, method: str, workers: int, **more: object) -> dict[str, object]:
        """A recipe of 60 updates with a checkpoint after every 20."""
        return {
            "model_name_or_path": str(self.model),
            "dataset": "quickstart_train",
            "dataset_dir": str(self.data / "data"),
            "cache_dir": str(self.data / "cache"),
            "cutoff_len": 64,
            "output_dir": str(self.folder / name),
            "ray_run_name": name,
            "ray_storage_path": str(self.folder / "runs"),
            "ray_address": self.address,
            "ray_init_kwargs": {"runtime_env": {"py_modules": []}},  # this cluster has our code already
            "ray_num_workers": workers,
            "resources_per_worker": {"CPU": 1},
            "per_device_train_batch_size": 16 // workers,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "max_steps": UPDATES,
            "save_steps": SAVE_STEPS,
            "logging_steps": 1,
            "report_to": "none",
            "plot_loss": False,
            "seed": 7,
            **METHODS[method],
            **more,
        }

    def recipe(self, name: str, method: str, workers: int, **more: object) -> Recipe:
        return read_flat(self.keys(name, method, workers, **more))

    def run(self, recipe: Recipe, display: Watching | None = None) -> Outcome:
        return train(recipe, display or Watching(), self.folder)

    def run_twin(self, method: str, workers: int) -> None:
        """The run that nothing happens to. With one worker it needs no Ray, which changes no number."""
        if workers > 1:
            assert self.run(self.recipe("twin", method, workers)).exit_code == 0
            return
        run_alone(self.recipe("twin", method, workers, save_strategy="no"), self.folder)

    def record(self, name: str) -> Path:
        return self.folder / "runs" / name / "record"

    def attempts(self, name: str) -> list[dict[str, Any]]:
        return read_attempts(self.record(name))

    def traces(self, name: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Everything of a finished run that must be equal bit for bit in its twin: its lines and its hashes."""
        lines = read_metrics(self.record(name) / "metrics.jsonl")
        exact = [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]
        return exact, json.loads((self.record(name) / "result.json").read_text())["fingerprints"]
