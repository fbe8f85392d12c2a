"""What is known of each worker: in the record, on the curves, and of one that is slow, by name."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.group import run_group
from tests.worker.alone import run_alone
from tests.worker.slowed import EXTRA_SECONDS

from tunefleet.artifacts.claim import claim_run
from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.metrics import read_metrics
from tunefleet.launch.cluster import local_shape
from tunefleet.launch.draft import draft
from tunefleet.launch.runs import open_run
from tunefleet.recipe.read import read_flat
from tunefleet.storage import place
from tunefleet.worker.events import Event, Noticed
from tunefleet.worker.pacing import SHOWN, peak_memory_bytes


def pair(folder: Path, plan: Path, run: RunFolder) -> list[list[Event]]:
    """Let two processes make an attempt, and return what each would have told a driver."""
    mark = claim_run(run.claim)
    told = [folder / f"{rank}.pickle" for rank in (0, 1)]
    common = [str(folder / "meet"), str(plan), run.root.uri, mark]
    ranks = [["tests.worker.slowed", str(rank), *common, str(file)] for rank, file in enumerate(told)]
    run_group(ranks, seconds=200)
    return [pickle.loads(file.read_bytes()) for file in told]


def test_a_worker_that_is_really_slow_is_named_by_its_own_work(job: dict[str, object], tmp_path: Path) -> None:
    keys = {
        "finetuning_type": "lora",
        "ray_num_workers": 2,
        "max_samples": 40,
        "per_device_train_batch_size": 2,
        "max_steps": 10,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "tensorboard",
    }
    recipe = read_flat({**job, **keys})
    plan = draft(recipe, local_shape(recipe.ray), tmp_path)
    run = RunFolder(place(plan.place.storage_path, base=tmp_path).child(plan.place.run_name))
    open_run(plan, run)
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    first, second = pair(tmp_path, tmp_path / "plan.json", run)

    said = [event.text for event in first if isinstance(event, Noticed) and "straggler" in event.text]
    assert len(said) == 1
    assert said[0].startswith(f"Rank 1 on {socket.gethostname()} is a straggler")
    assert not any(isinstance(event, Noticed) for event in second), "only the first rank speaks"

    lines = read_metrics(Path(run.record.child("metrics.jsonl").uri))
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    for line in lines:
        workers: dict[str, list[float]] = line["workers"]
        assert workers.keys() == set(SHOWN)
        assert all(len(values) == 2 for values in workers.values())
        fast, slow = workers["compute_seconds"]
        assert slow - fast > EXTRA_SECONDS, "two layers, at each of them some more work"
        assert min(workers["tokens_per_second"]) > 0
        assert sum(workers["tokens_per_second"]) == pytest.approx(line["tokens_per_second"], rel=0.3)
        assert min(workers["memory_peak_bytes"]) > 50 * 2**20
    own, waiting = lines[-1]["workers"]["step_seconds"]
    assert own == pytest.approx(waiting, rel=0.3), "they meet at each update, so this says nothing"
    assert lines[-1]["workers"]["bytes_sent"] == [lines[-1]["workers"]["bytes_sent"][0]] * 2

    curves = EventAccumulator(str(Path(run.record.child("tensorboard").uri)))
    curves.Reload()
    assert {f"workers/{figure}/rank_{rank}" for figure in SHOWN for rank in (0, 1)} <= set(curves.Tags()["scalars"])


def test_a_worker_alone_has_figures_too(job: dict[str, object], tmp_path: Path) -> None:
    finished = run_alone(read_flat({**job, "max_samples": 8, "max_steps": 3, "logging_steps": 1}), tmp_path)
    lines = read_metrics(Path(finished.folder.record.child("metrics.jsonl").uri))
    assert len(lines) == 3
    for line in lines:
        workers: dict[str, Any] = line["workers"]
        assert workers["tokens_per_second"] == [pytest.approx(line["tokens_per_second"], rel=1e-6)]
        assert 0 < workers["compute_seconds"][0] + workers["data_wait_seconds"][0] < workers["step_seconds"][0]
        assert workers["bytes_sent"] == [0]
    assert not any(isinstance(event, Noticed) and "straggler" in event.text for event in finished.told.events)


def test_the_peak_of_memory_stays_when_the_memory_is_given_back() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(2**27)  # half a GiB
    del block
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= before
    assert after > 2**29
