"""Whole runs under Ray whose truth lies in a bucket: killed, cut off from it, continued from it, brought home."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.s3_server import Server, Way, uri
from tests.worker.under_ray import SAVE_STEPS, UPDATES, Watching, World

from tunefleet.artifacts.metrics import TIMING_FIELDS, read_metrics
from tunefleet.errors import Refused
from tunefleet.storage import place
from tunefleet.worker.events import Event, Saved, Stepped

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def runs(server: Server) -> None:
    server.bucket("runs")


def traces(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Lines and hashes of a run that was brought home or kept on a disk."""
    lines = read_metrics(folder / "metrics.jsonl")
    exact = [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]
    return exact, json.loads((folder / "result.json").read_text())["fingerprints"]


def assert_no_credential_below(folder: str, server: Server) -> None:
    """Read everything that a run has left in its bucket."""
    keys = (os.environ["AWS_SECRET_ACCESS_KEY"].encode(), b"AWS_SECRET")
    left = [name for name in server.objects("runs") if name.startswith(f"{folder}/")]
    assert left
    for name in left:
        content = server.client().get_object(Bucket="runs", Key=name)["Body"].read()
        assert not any(key in content for key in keys), name


class Killer:
    """Kills rank 0 once, between the first checkpoint and the second; it reads who that is from the bucket."""

    def __init__(self, record: str) -> None:
        self._attempts = place(record).child("attempts.jsonl")
        self._saved = False
        self.killed: int | None = None

    def __call__(self, event: Event) -> None:
        self._saved = self._saved or isinstance(event, Saved)
        if self._saved and self.killed is None and isinstance(event, Stepped) and event.step.step > SAVE_STEPS:
            self.killed = json.loads(self._attempts.read_text().splitlines()[-1])["pid"]
            os.kill(self.killed, signal.SIGKILL)


def test_a_killed_worker_goes_on_from_the_bucket(world: World, server: Server) -> None:
    storage = uri("runs/a", server.host)
    world.run_twin("full", 1)
    killer = Killer(uri("runs/a/killed/record", server.host))
    outcome = world.run(world.recipe("killed", "full", 1, ray_storage_path=storage), Watching(killer))
    assert killer.killed is not None
    assert outcome.exit_code == 0
    home = world.folder / "killed"
    attempts = [json.loads(line) for line in (home / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["reason"] for attempt in attempts] == ["killed", "finished"]
    # Whoever kills hears of a step a moment after it: the next checkpoint may be there by then.
    start = attempts[-1]["start_step"]
    assert start in (SAVE_STEPS, 2 * SAVE_STEPS)
    assert attempts[-1]["executed_steps"] == UPDATES - start
    assert traces(home) == traces(world.record("twin"))
    assert (home / "model.safetensors").is_file()
    assert_no_credential_below("a", server)
    with pytest.raises(Refused, match="is finished"):
        world.run(world.recipe("killed", "full", 1, ray_storage_path=storage))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_half_a_minute_without_the_bucket_costs_nothing_but_time(
    world: World, server: Server, way: Way, workers: int
) -> None:
    """The way is cut in the middle of the first checkpoint: of our files, and then of Ray's own notes."""
    world.run_twin("lora_dropout", workers)
    recipe = world.recipe("cut", "lora_dropout", workers, ray_storage_path=uri(f"runs/b{workers}", way.host))

    def react(event: Event) -> None:
        if isinstance(event, Stepped) and event.step.step == SAVE_STEPS - 2:
            way.refused_bytes_from = way.passed_bytes + 20_000
            threading.Timer(30, way.mend).start()

    outcome = world.run(recipe, Watching(react))
    assert outcome.exit_code == 0
    home = world.folder / "cut"
    attempts = [json.loads(line) for line in (home / "attempts.jsonl").read_text().splitlines()]
    assert [(attempt["reason"], attempt["executed_steps"]) for attempt in attempts] == [("finished", UPDATES)]
    assert traces(home) == traces(world.record("twin"))
    checkpoints = place(uri(f"runs/b{workers}/cut/checkpoints", server.host)).children()
    assert len(checkpoints) == UPDATES // SAVE_STEPS
    assert all(checkpoint.problem(hashes=True) is None for checkpoint in checkpoints)
    assert_no_credential_below(f"b{workers}", server)


@pytest.mark.slow
def test_the_driver_stops_and_the_same_command_goes_on_from_the_bucket(world: World, server: Server) -> None:
    storage = uri("runs/c", server.host)
    world.run_twin("lora_dropout", 2)

    def react(event: Event) -> None:
        if isinstance(event, Stepped) and event.step.step == SAVE_STEPS + 3:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = world.recipe("stopped", "lora_dropout", 2, ray_storage_path=storage)
    assert world.run(recipe, Watching(react)).exit_code == 143
    watching = Watching()
    assert world.run(recipe, watching).exit_code == 0
    assert any("goes on from step" in note for note in watching.notes)
    assert traces(world.folder / "stopped") == traces(world.record("twin"))
    assert_no_credential_below("c", server)


@pytest.mark.parametrize("wrong", ["bucket", "credentials", "server"])
def test_a_store_that_cannot_be_used_is_refused_before_anything_is_started(
    world: World, server: Server, way: Way, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    storage = uri("no-such-bucket/x" if wrong == "bucket" else "runs/d", way.host)
    monkeypatch.setattr("tunefleet.launch.home._TRIAL_SECONDS", 1.0)
    monkeypatch.setattr("tunefleet.launch.train._fit", lambda *_: pytest.fail("it was started"))
    if wrong == "credentials":
        server.demand_credentials()
    if wrong == "server":
        way.cut()
    try:
        with pytest.raises(Refused) as caught:
            world.run(world.recipe("refused", "full", 1, ray_storage_path=storage))
    finally:
        server.demand_credentials(after=10**9)
    said = {"bucket": "make the bucket", "credentials": "AWS_ACCESS_KEY_ID", "server": "out of reach for 1 s"}[wrong]
    assert str(caught.value).startswith("ray_storage_path: s3://")
    assert said in str(caught.value)
    assert not [name for name in server.objects("runs") if name.startswith("d/")]
