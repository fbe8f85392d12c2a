"""A job server for the tests of this folder, and a person who sends recipes to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.job_server import Desk, Give, Head, job_server

from tunefleet import cli

UPDATES = 10


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster that wants no token."""
    with job_server(tmp_path_factory.mktemp("head")) as started:
        yield started


@pytest.fixture
def desk(head: Head, tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> Desk:
    """Data beside the recipe, of which a few rows travel; the model is where the cluster has it."""
    write_recipe(tmp_path, tiny_model, quickstart_world)
    return Desk(tmp_path, head)


def write_recipe(folder: Path, model: Path, world: Path) -> None:
    """`recipe.yaml` with its data, whose run is `sent`."""
    rows = (world / "data" / "train.jsonl").read_text().splitlines(keepends=True)[:48]
    (folder / "rows.jsonl").write_text("".join(rows))
    keys = {
        "model_name_or_path": str(model),
        "dataset": "rows.jsonl",
        "cutoff_len": 64,
        "finetuning_type": "lora",
        "per_device_train_batch_size": 2,
        "max_steps": UPDATES,
        "logging_steps": 1,
        "report_to": "none",
        "plot_loss": False,
        "bf16": False,
        "output_dir": "out",
        "ray_run_name": "sent",
        "ray_storage_path": str(folder / "storage"),
        "ray_num_workers": 1,
        "resources_per_worker": {"CPU": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))


@pytest.fixture
def give(desk: Desk, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Give:
    """Give commands at the desk, in this very process, which has imported everything already."""

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.chdir(desk.folder)
        monkeypatch.setattr(sys, "argv", ["tunefleet", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), out + err

    return command
