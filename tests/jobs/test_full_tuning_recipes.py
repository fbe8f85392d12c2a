"""GaLore and BAdam on the quickstart's own model: the shipped recipes, and the documented examples as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.worker.alone import Finished, run_alone

from tunefleet.artifacts.metrics import Line, read_metrics
from tunefleet.recipe.read import read_flat, read_recipe
from tunefleet.worker.events import Noticed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

JOBS = Path(__file__).resolve().parents[2] / "jobs"

TRAINING: dict[str, object] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "pure_bf16": True,
    "cutoff_len": 2048,
    "max_samples": 1000,
    "preprocessing_num_workers": 1,
    "per_device_train_batch_size": 1,
    "learning_rate": 1.0e-5,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "logging_steps": 10,
    "plot_loss": True,
    "overwrite_output_dir": True,
}
"""What the examples of the documentation share; three epochs are cut to the updates of the test."""
DOCUMENTED: dict[str, dict[str, object]] = {
    "galore": {
        "use_galore": True,
        "galore_layerwise": True,
        "galore_target": "mlp,self_attn",
        "galore_rank": 128,
        "galore_scale": 2.0,
        "gradient_accumulation_steps": 1,
    },
    "badam": {
        "use_badam": True,
        "badam_mode": "layer",
        "badam_switch_mode": "ascending",
        "badam_switch_interval": 50,
        "badam_verbose": 2,
        "gradient_accumulation_steps": 8,
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's folder at its own size."""
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, str(JOBS / "prepare_quickstart.py"), "--to", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


def lines(finished: Finished) -> list[Line]:
    return read_metrics(Path(finished.folder.root.uri) / "record" / "metrics.jsonl")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_example_runs_as_it_stands_and_learns(name: str, world: Path, tmp_path: Path) -> None:
    places = {
        "model_name_or_path": str(world / "init"),
        "dataset": "quickstart_train",
        "dataset_dir": str(world / "data"),
        "cache_dir": str(world / "cache"),
        "output_dir": "out",
        "ray_storage_path": str(tmp_path / "runs"),
        "resources_per_worker": {"CPU": 1},
    }
    measured = {
        "max_steps": 60,
        "val_size": 0.1,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 30,
        "eval_on_start": True,
        "save_strategy": "no",
    }
    finished = run_alone(read_flat(TRAINING | DOCUMENTED[name] | places | measured), tmp_path)
    held_out = [line["eval_loss"] or 0.0 for line in lines(finished) if "eval_loss" in line]
    assert held_out[0] > held_out[1] > held_out[2]
    assert held_out[2] < held_out[0] - 0.005
    told = [event.text for event in finished.told.events if isinstance(event, Noticed) and "trains block" in event.text]
    spans = ["Updates 1 to 50: badam trains block 0 ", "Updates 51 to 100: badam trains block 1 "]
    assert [text.partition("(")[0] for text in told] == (spans if name == "badam" else [])


@pytest.mark.parametrize("name", ["galore_sft", "galore_layerwise_sft", "badam_layer_sft", "badam_ratio_sft"])
def test_a_shipped_recipe_learns(name: str, world: Path, tmp_path: Path) -> None:
    words = [
        f"model_name_or_path={world / 'init'}",
        f"dataset_dir={world / 'data'}",
        f"cache_dir={world / 'cache'}",
        f"ray_storage_path={tmp_path / 'runs'}",
        "max_steps=60",
        "eval_steps=60",
        "eval_on_start=true",
        "max_samples=1000",
        "save_strategy=no",
    ]
    finished = run_alone(read_recipe(JOBS / f"{name}.yaml", words), tmp_path)
    held_out = [line["eval_loss"] or 0.0 for line in lines(finished) if "eval_loss" in line]
    assert held_out[-1] < 0.95 * held_out[0]
