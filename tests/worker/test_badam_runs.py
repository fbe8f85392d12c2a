"""Whole runs with BAdam, in this process: what the published optimizers leave out, and what a verbose run says."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.worker.alone import Finished, run_alone

from tunefleet.artifacts.metrics import read_metrics
from tunefleet.recipe.read import read_flat
from tunefleet.worker.events import Noticed, Stepped

BADAM: dict[str, object] = {"finetuning_type": "full", "use_badam": True, "badam_switch_interval": 3}


@pytest.fixture
def keys(job: dict[str, object]) -> dict[str, object]:
    return job | BADAM | {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1, "bf16": False}


@pytest.fixture
def small_heap() -> Iterator[None]:
    """The published optimizer collects garbage at every switch, which takes long with many modules loaded."""
    gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it expects half-precision weights
        yield
    gc.unfreeze()


def part(finished: Finished, *names: str) -> Path:
    return Path(finished.folder.root.child(*names).uri)


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("mode", ["layer", "ratio"])
def test_the_state_of_the_published_optimizers_is_not_saved(keys: dict[str, object], mode: str, tmp_path: Path) -> None:
    more = {"badam_mode": mode, "optimizer_backend": "upstream", "badam_update_ratio": 0.5}
    recipe = read_flat(keys | more | {"max_steps": 10, "save_steps": 5})
    stopped = run_alone(recipe, tmp_path, stop_at=6)
    assert stopped.ending["stopped"]
    assert part(stopped, "checkpoints", "step_00000005", "weights.safetensors").is_file()
    assert not part(stopped, "checkpoints", "step_00000005", "optimizer.pt").exists()
    plan = json.loads(part(stopped, "record", "plan.json").read_text())
    assert not plan["resumable"]
    assert any("optimizer_backend: upstream cannot be saved" in notice for notice in plan["notices"])
    again = run_alone(recipe, tmp_path)
    assert again.notices == ("The unfinished run out keeps nothing to go on from and begins anew.",)
    assert again.ending["executed_steps"] == 10
    losses = [line["loss"] or 0.0 for line in read_metrics(part(again, "record", "metrics.jsonl"))]
    assert min(losses[-3:]) < losses[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"badam_verbose": 2},
            [
                ("Updates 1 to 3: badam trains block 0 (model.layers.0) of 2: model.layers.0.self_attn.q_proj", 1),
                ("Updates 4 to 6: badam trains block 1 (model.layers.1) of 2: model.layers.1.self_attn.q_proj", 4),
                ("Updates 7 to 9: badam trains block 0 (model.layers.0) of 2: model.layers.0.self_attn.q_proj", 7),
            ],
        ),
        (
            {"badam_verbose": 1, "badam_mode": "ratio"},
            [
                ("Updates 1 to 3: badam trains 0.05 of the entries of every parameter, visit 0.", 1),
                ("Updates 4 to 6: badam trains 0.05 of the entries of every parameter, visit 1.", 4),
                ("Updates 7 to 9: badam trains 0.05 of the entries of every parameter, visit 2.", 7),
            ],
        ),
        ({"badam_verbose": 0}, []),
    ],
)
def test_a_verbose_run_tells_its_driver_what_trains(
    keys: dict[str, object], more: dict[str, object], said: list[tuple[str, int]], tmp_path: Path
) -> None:
    """With the first update of each visit, beside the step that it belongs to."""
    finished = run_alone(read_flat(keys | more | {"max_steps": 7, "save_strategy": "no"}), tmp_path)
    told, step = [], 0
    for event in finished.told.events:
        if isinstance(event, Stepped):
            step = event.step.step
        if isinstance(event, Noticed) and "badam trains" in event.text:
            told.append((event.text, step))
    assert len(told) == len(said)
    for (text, at), (beginning, expected) in zip(told, said, strict=True):
        assert text.startswith(beginning)
        assert at == expected
