"""A search as a job: sent, stopped while trials train, sent again, and gone on with where each trial was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.job_server import Desk

from tunefleet.artifacts.record import read_attempts

UPDATES, SAVE_STEPS = 2000, 50

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def search(desk: Desk) -> Path:
    """The folder of the search on storage; the desk's recipe asks for it."""
    path = desk.folder / "recipe.yaml"
    keys: dict[str, Any] = yaml.safe_load(path.read_text())
    keys |= {
        "ray_run_name": "searched",
        "max_steps": UPDATES,
        "save_steps": SAVE_STEPS,
        "logging_steps": 10,
        "eval_dataset": "rows.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 200,
        "tune": {"search": "grid", "space": {"lora_rank": {"choice": [2, 4]}}},
    }
    path.write_text(yaml.safe_dump(keys))
    return desk.storage / "searched"


def trials(search: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((search / "trials.json").read_text())["trials"]
    return found


def attempts(search: Path, trial: str) -> list[dict[str, Any]]:
    return read_attempts(search / "trials" / trial / "record")


def test_a_search_is_stopped_and_sent_again(desk: Desk, search: Path) -> None:
    code, text = desk.give("submit", "recipe.yaml", "--tune", "--no-wait")
    assert (code, "searched-1" in text) == (0, True), text
    desk.await_line("searched-1", "eval_loss")  # a trial has come half way
    assert desk.give("jobs", "stop", "searched-1")[0] == 0
    code, text = desk.give("jobs", "logs", "searched-1")
    assert (code, "the same command goes on from their checkpoints" in text) == (143, True), text
    waiting = [trial["name"] for trial in trials(search) if trial["state"] == "waiting"]
    assert waiting

    code, text = desk.give("submit", "recipe.yaml", "--tune")
    assert (code, "searched-2" in text) == (0, True), text
    assert [trial["state"] for trial in trials(search)] == ["finished", "finished"]
    for name in waiting:
        first, *_, last = attempts(search, name)
        assert first["reason"] == "stopped"
        assert last["start_step"] > 0
        assert first["executed_steps"] + last["executed_steps"] == UPDATES

    assert "best.yaml" in {one.name for one in (search / "result").iterdir()}
