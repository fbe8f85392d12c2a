"""Killed at some step, or stopped, and continued: the run is the one that nothing happened to, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import pytest
import yaml
from tests.worker.under_ray import SAVE_STEPS, UPDATES, World

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

QUICK = [("full", 1), ("lora_dropout", 2), ("galore", 1), ("badam_ascending", 1)]
SLOW = [
    ("full", 2),
    ("full_fsdp2", 2),
    ("lora_fsdp2", 2),
    ("badam_fsdp2", 2),
    ("full_zero3", 2),
    ("lora_zero2", 2),
    ("badam_zero3", 2),
    ("freeze", 1),
    ("freeze", 2),
    ("lora_dropout", 1),
    ("dora", 1),
    ("dora", 2),
    ("pissa", 1),
    ("pissa", 2),
    ("galore", 2),
    ("galore_layerwise", 1),
    *((f"galore_{mode}", 1) for mode in ("svd", "reverse_std", "right", "left", "full")),
    ("badam_ascending", 2),
    ("badam_descending", 1),
    ("badam_random", 1),
    ("badam_random", 2),
    ("badam_fixed", 1),
    ("badam_adjacent", 1),
    ("badam_scatter", 1),
]
CELLS = [*QUICK, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW)]
MODES = [cell for cell in SLOW if cell[0].startswith(("galore", "badam")) and cell[1] == 1]
"""A driver that stops does so between two updates, whatever the mode; only kills are tried in each."""
STOPPED = [cell for cell in [*QUICK, *SLOW] if cell != ("pissa", 1) and cell not in MODES]


class Killer(threading.Thread):
    """Kills rank 0 with SIGKILL once, behind a step, as soon as a checkpoint is in storage.

    It looks at the disk: what a driver is told comes later, on a busy machine even behind the run's last step.
    """

    def __init__(self, world: World, name: str, step: int) -> None:
        super().__init__(daemon=True)
        self._world, self._name, self._step = world, name, step
        self._lines = world.record(name) / "metrics.jsonl"
        self._checkpoints = world.folder / "runs" / name / "checkpoints"
        self._over = threading.Event()
        self.killed: int | None = None

    def run(self) -> None:
        while not self._over.wait(0.002):
            saved = any(self._checkpoints.glob("step_*/complete.json"))
            if saved and self._lines.read_bytes().count(b"\n") >= self._step:
                self.killed = self._world.attempts(self._name)[-1]["pid"]
                os.kill(self.killed, signal.SIGKILL)
                return

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def assert_resumed_like_twin(world: World, name: str, reasons: list[str]) -> None:
    """The last attempt took exactly the steps behind a checkpoint, and nothing differs from the twin."""
    attempts = world.attempts(name)
    assert [attempt["reason"] for attempt in attempts] == reasons
    last = attempts[-1]
    assert last["start_step"] in range(1, UPDATES)
    assert last["executed_steps"] == UPDATES - last["start_step"]
    lines, hashes = world.traces(name)
    twin_lines, twin_hashes = world.traces("twin")
    assert [line["step"] for line in lines] == list(range(1, UPDATES + 1))
    assert lines == twin_lines
    assert hashes == twin_hashes


@pytest.mark.parametrize(("method", "workers"), CELLS)
def test_a_killed_worker_resumes_exactly(world: World, method: str, workers: int) -> None:
    world.run_twin(method, workers)
    with Killer(world, "killed", SAVE_STEPS + 3) as killer:
        outcome = world.run(world.recipe("killed", method, workers))
    assert killer.killed is not None
    assert outcome.exit_code == 0
    assert world.attempts("killed")[-1]["start_step"] % SAVE_STEPS == 0
    assert_resumed_like_twin(world, "killed", ["killed", "finished"])


@pytest.mark.parametrize(
    ("method", "workers"),
    [("pissa", 1), *(pytest.param(*cell, marks=pytest.mark.slow) for cell in STOPPED)],
)
def test_a_driver_that_was_interrupted_stops_with_a_checkpoint_and_goes_on(
    world: World, method: str, workers: int
) -> None:
    world.run_twin(method, workers)
    recipe = world.folder / "stopped.yaml"
    recipe.write_text(yaml.safe_dump(world.keys("stopped", method, workers)))
    command = [str(Path(sys.executable).with_name("tunefleet")), "train", str(recipe)]
    # In a group of its own, as a shell gives it: the signal reaches what the driver started as well.
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith(f"step {SAVE_STEPS + 3}/"):
            os.killpg(driver.pid, signal.SIGINT)
            break
    rest = driver.stdout.read()
    assert driver.wait(timeout=60) == 130, rest
    assert "the same command goes on" in rest
    stopped = world.attempts("stopped")[-1]["end_step"]
    assert (world.folder / "runs" / "stopped" / "checkpoints" / f"step_{stopped:08d}" / "complete.json").is_file()

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"goes on from step {stopped}" in done.stdout
    assert world.attempts("stopped")[-1]["start_step"] == stopped
    assert_resumed_like_twin(world, "stopped", ["stopped", "finished"])
