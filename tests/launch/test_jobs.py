"""Jobs of a real job server: sent, followed, looked at, stopped, sent again; and what is refused before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.job_server import Desk, Give, job_server
from tests.launch.conftest import UPDATES, write_recipe

from tunefleet.errors import Refused
from tunefleet.launch.jobs import Order, entrypoint_of, environment_of

# ---- before anything is sent ----------------------------------------------------------------------------------------


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


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_one_job_is_followed_to_its_model_and_one_is_stopped(desk: Desk, give: Give) -> None:
    """The second one starts beside the first; while it is under way, another job of its run is refused."""
    at = ("--address", desk.head.url)
    long = ("submit", "recipe.yaml", "ray_run_name=halted", "max_steps=4000", "--no-wait", *at)
    code, text = give(*long)
    assert (code, "tunefleet jobs logs halted-1 --address" in text) == (0, True), text

    code, text = give("submit", "recipe.yaml", "seed=3", *at)
    assert code == 0, text
    assert "sent-1 (1 local files" in text
    assert f"step {UPDATES}/{UPDATES}" in text
    assert str(desk.storage / "sent" / "model") in text
    record = desk.storage / "sent" / "record"
    assert json.loads((record / "record.json").read_text())["recipe"]["seed"] == 3
    assert give("fetch", "sent", "--to", "home", "--storage", str(desk.storage))[0] == 0
    assert (desk.folder / "home" / "adapter_model.safetensors").is_file()

    code, text = give(*long)
    assert (code, "is under way already, as job halted-1" in text) == (2, True), text
    desk.await_line("halted-1", "step 5/4000")
    assert give("jobs", "stop", "halted-1", *at)[0] == 0
    code, text = give("jobs", "logs", "halted-1", *at)
    assert (code, "Stopped at step" in text) == (143, True), text
    newest = max((desk.storage / "halted" / "checkpoints").glob("step_*"))
    assert f"Stopped at step {int(newest.name.removeprefix('step_'))}" in text

    code, text = give("jobs", "list", *at)
    assert (code, *(word in text for word in ("sent-1", "succeeded", "halted-1", "stopped"))) == (0, *[True] * 4)
    for nobody in ("nobody", "", "a/b"):
        code, text = give("jobs", "status", nobody, *at)
        assert (code, "knows no job" in text) == (2, True), text


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_is_refused_by_its_job(desk: Desk) -> None:
    words = ("submit", "recipe.yaml", "ray_run_name=done", "max_steps=2")
    assert desk.give(*words)[0] == 0
    code, text = desk.give(*words)
    assert (code, "done-2" in text, "is finished" in text) == (2, True, True), text
    # Ray gives jobs that bring the same files one folder, so both have the same output_dir.
    code, text = desk.give("submit", "recipe.yaml", "ray_run_name=other", "max_steps=2")
    assert (code, str(desk.storage / "other" / "model") in text) == (0, True), text


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_detached_stopped_and_sent_again(desk: Desk) -> None:
    """Ctrl-C leaves the job alone, a second one of the run is refused, a stopped one goes on when it is sent again."""
    long = ("ray_run_name=left", "max_steps=4000", "save_steps=50")
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
    assert (code, "is under way already, as job left-1" in text) == (2, True), text
    assert desk.give("jobs", "stop", "left-1")[0] == 0
    code, text = desk.give("jobs", "logs", "left-1")
    assert code == 143, text
    assert "Stopped at step" in text

    checkpoints = desk.storage / "left" / "checkpoints"
    newest = max(int(one.name.removeprefix("step_")) for one in checkpoints.iterdir())
    code, text = desk.give("submit", "recipe.yaml", *long, "--no-wait")
    assert (code, "left-2" in text) == (0, True), text
    desk.await_line("left-2", f"goes on from step {newest}")
    assert desk.give("jobs", "stop", "left-2")[0] == 0
    assert desk.give("jobs", "logs", "left-2")[0] == 143


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_cannot_start_is_explained(desk: Desk) -> None:
    code, text = desk.give(
        "submit", "recipe.yaml", "ray_run_name=held", "--driver-resource", "trial_driver=1", "--pending-timeout", "4"
    )
    assert code == 1
    assert "its process asks for 1 trial_driver; the 1 node(s) have 2 CPU; no node has 1 trial_driver" in text
    code, text = desk.give("jobs", "stop", "held-1")
    assert (code, "has not started, and Ray stops only what has" in text) == (0, True), text
    code, text = desk.give("submit", "recipe.yaml", "ray_run_name=held")
    assert (code, "as job held-1, which has not started" in text) == (2, True), text


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_token_is_asked_for_and_taken(tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> None:
    write_recipe(tmp_path, tiny_model, quickstart_world)
    with job_server(tmp_path, token="a" * 32) as guarded:
        desk = Desk(tmp_path, guarded)
        none = {"HOME": str(tmp_path / "empty"), "RAY_AUTH_MODE": "disabled"}
        code, text = desk.give("jobs", "list", **none)
        assert (code, "wants a token" in text) == (2, True), text
        code, text = desk.give("jobs", "list", RAY_AUTH_TOKEN="b" * 32)
        assert (code, "does not take this machine's token" in text) == (2, True), text
        code, text = desk.give("jobs", "list")
        assert (code, "No job was submitted" in text) == (0, True), text
        code, text = desk.give("submit", "recipe.yaml")
        assert (code, f"step {UPDATES}/{UPDATES}" in text) == (0, True), text
        held = ("ray_run_name=held", "--driver-resource", "trial_driver=1", "--pending-timeout", "3")
        code, text = desk.give("submit", "recipe.yaml", *held)
        assert (code, "no node has 1 trial_driver" in text) == (1, True), text
