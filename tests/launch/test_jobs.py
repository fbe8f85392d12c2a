"""Jobs of a real job server: sent, followed, looked at, stopped, sent again; and what is refused before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from tests.job_server import Head, job_server

from tunefleet.errors import Refused
from tunefleet.launch.jobs import Order, connect, entrypoint_of, environment_of

UPDATES, SAVE_STEPS = 40, 10


# ---- before anything is sent ----------------------------------------------------------------------------------------


class Shop(BaseHTTPRequestHandler):
    """Some other service: it answers everything, and knows nothing of Ray. `/old` is a cluster of long ago."""

    def do_GET(self) -> None:
        old = self.path.startswith("/old")
        content = b'{"version": "4", "ray_version": "2.9.3", "ray_commit": "x"}' if old else b"<html>Welcome</html>"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def shop() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Shop)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:6379", "is no URL of a dashboard"),
        ("ray://127.0.0.1:10001", "is no URL of a dashboard"),
        ("http://127.0.0.1:9", "Nothing answers at http://127.0.0.1:9"),
    ],
)
def test_an_address_without_a_dashboard_is_refused(address: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        connect(address)


def test_another_service_and_another_ray_are_refused(shop: str) -> None:
    with pytest.raises(Refused, match="is no Ray dashboard"):
        connect(shop)
    with pytest.raises(Refused, match=r"runs Ray 2\.9\.3 and this machine"):
        connect(f"{shop}/old")


def shell(command: str, environment: Mapping[str, str]) -> tuple[int, str, str]:
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout, done.stderr


def test_secrets_are_named_and_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert environment_of(["HF_HUB_OFFLINE"]) == {"HF_HUB_OFFLINE": "1"}
    with pytest.raises(Refused, match="--secret HF_TOKEN"):
        environment_of(["HF_TOKEN"])
    with pytest.raises(Refused, match="no such variable"):
        environment_of(["NOT_THERE"])
    text = entrypoint_of(Order("train", ["seed=1"], "r", "s", secrets=["HF_TOKEN"]))
    assert "hunter2" not in text
    without = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    there = text.replace("exec python -m tunefleet", "exec echo ran")
    assert shell(there, os.environ) == (0, "ran train recipe.yaml seed=1\n", "")
    code, said, why = shell(there, without)
    assert (code, said) == (2, "")
    assert "no variable HF_TOKEN" in why


def test_words_of_the_command_line_stay_words() -> None:
    text = entrypoint_of(Order("tune", ["output_dir=a b; rm -rf x"], "r", "s"))
    _, words, _ = shell(text.replace("exec python", "exec printf '%s\\n'"), os.environ)
    assert words.splitlines() == ["-m", "tunefleet", "tune", "recipe.yaml", "output_dir=a b; rm -rf x"]


# ---- a real head ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with job_server(tmp_path_factory.mktemp("head")) as started:
        yield started


class Desk:
    """A person's folder, with a recipe and its data, and the commands that are given there."""

    def __init__(self, folder: Path, head: Head) -> None:
        self.folder, self.head = folder, head

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        program = str(Path(sys.executable).with_name("tunefleet"))
        return subprocess.Popen(
            [program, *words, "--address", self.head.url],
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def give(self, *words: str, **environment: str) -> tuple[int, str]:
        process = self.start(*words, **environment)
        text, _ = process.communicate(timeout=240)
        return process.returncode, text

    @property
    def storage(self) -> Path:
        return self.folder / "storage"


@pytest.fixture
def desk(head: Head, tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> Desk:
    """Data beside the recipe, of which a few rows travel; the model is where the cluster has it."""
    rows = (quickstart_world / "data" / "train.jsonl").read_text().splitlines(keepends=True)[:48]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    keys = {
        "model_name_or_path": str(tiny_model),
        "dataset": "rows.jsonl",
        "cutoff_len": 64,
        "finetuning_type": "lora",
        "per_device_train_batch_size": 2,
        "max_steps": UPDATES,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": "out",
        "ray_run_name": "sent",
        "ray_storage_path": str(tmp_path / "storage"),
        "ray_num_workers": 1,
        "resources_per_worker": {"CPU": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return Desk(tmp_path, head)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_recipe_runs_as_a_job_and_its_model_is_fetched(desk: Desk) -> None:
    code, text = desk.give("submit", "recipe.yaml", "seed=3")
    assert code == 0, text
    assert "sent-1 (1 local files" in text
    assert f"step {UPDATES}/{UPDATES}" in text
    record = desk.storage / "sent" / "record"
    assert json.loads((record / "record.json").read_text())["recipe"]["seed"] == 3
    program = str(Path(sys.executable).with_name("tunefleet"))
    fetched = subprocess.run(
        [program, "fetch", "sent", "--to", "home", "--storage", str(desk.storage)], cwd=desk.folder, check=True
    )
    assert fetched.returncode == 0
    assert (desk.folder / "home" / "adapter_model.safetensors").is_file()

    code, text = desk.give("jobs", "list")
    assert (code, "sent-1" in text, "succeeded" in text) == (0, True, True)
    code, text = desk.give("submit", "recipe.yaml")  # finished: refused by the job itself
    assert code == 2, text
    assert "is finished" in text
    code, text = desk.give("jobs", "status", "nobody")
    assert (code, "knows no job nobody" in text) == (2, True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_detached_stopped_and_sent_again(desk: Desk) -> None:
    """Ctrl-C leaves the job alone, a second one of the run is refused, a stopped one goes on when it is sent again."""
    long = ("max_steps=4000", "save_steps=50")
    process = desk.start("submit", "recipe.yaml", *long)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 60/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(30) == 130
    assert "Detached; the job goes on" in rest

    code, text = desk.give("submit", "recipe.yaml", *long)
    assert (code, "is under way already, as job sent-1" in text) == (2, True), text
    assert desk.give("jobs", "stop", "sent-1")[0] == 0
    code, text = desk.give("jobs", "logs", "sent-1")
    assert code == 143, text
    assert "Stopped at step" in text

    checkpoints = desk.storage / "sent" / "checkpoints"
    newest = max(int(one.name.removeprefix("step_")) for one in checkpoints.iterdir())
    code, text = desk.give("submit", "recipe.yaml", *long, "--no-wait")
    assert (code, "sent-2" in text) == (0, True), text
    until = time.monotonic() + 60
    while f"goes on from step {newest}" not in text and time.monotonic() < until:
        time.sleep(1)
        text = _logs_so_far(desk, "sent-2")
    assert f"goes on from step {newest}" in text
    assert desk.give("jobs", "stop", "sent-2")[0] == 0
    assert desk.give("jobs", "logs", "sent-2")[0] == 143


def _logs_so_far(desk: Desk, job: str) -> str:
    return connect(desk.head.url).get_job_logs(job)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_cannot_start_is_explained(desk: Desk) -> None:
    code, text = desk.give(
        "submit", "recipe.yaml", "ray_run_name=held", "--driver-resource", "trial_driver=1", "--pending-timeout", "4"
    )
    assert code == 1
    assert "its process asks for 1 trial_driver; the 1 node(s) have 2 CPU; no node has trial_driver" in text
    assert desk.give("jobs", "stop", "held-1")[0] == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_token_is_asked_for_and_taken(tmp_path: Path) -> None:
    with job_server(tmp_path, token="a" * 32) as guarded:
        desk = Desk(tmp_path, guarded)
        none = {"HOME": str(tmp_path / "empty"), "RAY_AUTH_MODE": "disabled"}
        code, text = desk.give("jobs", "list", **none)
        assert (code, "wants a token" in text) == (2, True), text
        code, text = desk.give("jobs", "list", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="b" * 32)
        assert (code, "does not take this machine's token" in text) == (2, True), text
        code, text = desk.give("jobs", "list", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)
        assert (code, "No job was submitted" in text) == (0, True), text
