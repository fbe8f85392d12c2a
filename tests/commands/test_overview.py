"""What `tunefleet ps` makes of the records below a storage path."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.worker.alone import run_alone

from tunefleet.artifacts.folder import RunFolder
from tunefleet.commands.overview import SILENT_SECONDS, Overview, overview_table, overviews
from tunefleet.errors import Refused
from tunefleet.recipe.read import read_flat
from tunefleet.search.book import Book, Report, Trial
from tunefleet.storage import place


def keys(tmp_path: Path, model: Path, world: Path, name: str) -> dict[str, object]:
    return {
        "model_name_or_path": str(model),
        "dataset": "quickstart_train",
        "eval_dataset": "quickstart_heldout",
        "dataset_dir": str(world / "data"),
        "cache_dir": str(world / "cache"),
        "max_samples": 16,
        "cutoff_len": 32,
        "finetuning_type": "lora",
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 2,
        "report_to": "none",
        "output_dir": str(tmp_path / "out" / name),
        "ray_run_name": name,
        "ray_storage_path": str(tmp_path / "runs"),
    }


def attempt(folder: RunFolder, **changed: object) -> None:
    """Write another last line of attempts.jsonl."""
    file = folder.record.child("attempts.jsonl")
    *earlier, last = file.read_text().splitlines()
    file.write_text("".join(f"{line}\n" for line in [*earlier, json.dumps(json.loads(last) | changed)]))


def test_a_run_in_each_of_its_states(tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> None:
    storage = place(tmp_path / "runs")
    whole = run_alone(read_flat(keys(tmp_path, tiny_model, quickstart_world, "whole")), tmp_path)
    stopped = run_alone(read_flat(keys(tmp_path, tiny_model, quickstart_world, "stopped")), tmp_path, stop_at=3)
    (tmp_path / "runs" / "other").mkdir()

    def seen(now: datetime | None = None) -> dict[str, Overview]:
        return {one.name: one for one in overviews(storage, now)}

    assert list(seen()) == ["stopped", "whole"]
    one = seen()["whole"]
    losses = [line["eval_loss"] for line in _lines(whole.folder) if "eval_loss" in line]
    assert (one.kind, one.state, one.method, one.done, one.of) == ("run", "finished", "lora", 6, 6)
    assert (one.metric, one.best) == ("eval_loss", min(losses))
    assert (seen()["stopped"].state, seen()["stopped"].done) == ("stopped", stopped.told.steps[-1])
    attempt(stopped.folder, end_step=5)
    assert seen()["stopped"].done == 5, "the last step may have had no line"

    attempt(stopped.folder, reason="failed: step 4: the disk is full")
    assert (seen()["stopped"].state, seen()["stopped"].why) == ("failed", "step 4: the disk is full")
    attempt(stopped.folder, reason="running")
    assert seen()["stopped"].state == "running"
    later = datetime.now(UTC) + timedelta(seconds=SILENT_SECONDS + 5)
    assert seen(later)["stopped"].state == "silent"
    assert seen(later)["whole"].state == "finished"

    stopped.folder.record.child("plan.json").write_text("{")
    assert seen()["stopped"].state == "unreadable"


def _lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.record.child("metrics.jsonl").read_text().splitlines()]


def test_a_search_counts_its_trials(tmp_path: Path) -> None:
    book = Book(place(tmp_path / "hunt"))
    reports: list[Report] = [{"step": 5, "eval_loss": 2.0}, {"step": 10, "eval_loss": 1.5}]
    book.trials = [
        Trial(1, "trial_0001_a", 0, "lora", "lora", {}, "a", workers=1, state="finished", reports=reports),
        Trial(2, "trial_0002_b", 1, "full", "galore", {}, "b", workers=1, state="running"),
    ]
    book.searched = {"tune.metric": "eval_loss", "tune.mode": "min"}
    book.save()
    (one,) = overviews(place(tmp_path))
    assert (one.kind, one.state, one.done, one.of) == ("search", "running", 1, 2)
    assert (one.method, one.metric, one.best) == ("lora, galore", "eval_loss", 1.5)
    book.trials[1].state = "waiting"
    book.save()
    assert overviews(place(tmp_path))[0].state == "stopped"
    book.complete = True
    book.save()
    assert overviews(place(tmp_path))[0].state == "finished"
    (tmp_path / "hunt" / "trials.json").write_text("[")
    assert overviews(place(tmp_path))[0].state == "unreadable"


def test_a_storage_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="ray_storage_path"):
        overviews(place(tmp_path / "nowhere"))


def test_the_table_says_how_long_ago() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    ages = {"30 s ago": 30, "2 min ago": 120, "3 h ago": 3 * 3600, "1 d ago": 86400}
    rows = [
        Overview(f"r{seconds}", "", "run", "running", last_word=now - timedelta(seconds=seconds))
        for seconds in ages.values()
    ]
    console = Console(width=120, record=True)
    console.print(overview_table(rows, now))
    text = console.export_text()
    assert all(age in text for age in ages)


def test_a_narrow_terminal_cuts_no_name() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    name = "quickstart-search_methods-second"
    row = Overview(name, "galore, lora, badam", "search", "finished", last_word=now, metric="eval_loss", best=4.83)
    console = Console(width=80, record=True)
    console.print(overview_table([row], now))
    assert name in console.export_text()


def test_a_file_is_no_storage_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be listed"):
        overviews(place(tmp_path / "file"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("attempts.jsonl", "5"), ("attempts.jsonl", '{"x": 1}'), ("attempts.jsonl", "{")),
        *(("metrics.jsonl", '{"step": "a"}'), ("metrics.jsonl", '{"step": 1, "loss": "x"}'), ("plan.json", "[]")),
    ],
)
def test_a_damaged_record_does_not_hide_the_other_runs(tmp_path: Path, name: str, text: str) -> None:
    for run in ("damaged", "whole"):
        (tmp_path / run / "record").mkdir(parents=True)
    (tmp_path / "damaged" / "record" / name).write_text(text + "\n")
    damaged, whole = overviews(place(tmp_path))
    assert (damaged.state, whole.state) == ("unreadable", "planned")
    assert damaged.why is not None
    assert damaged.why.startswith("its record is damaged")
