"""What happens to the runs of the chaos test: which part is hit, at a step between two checkpoints."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import yaml
from tests.cluster import RayNodes
from tests.s3_server import Way
from tests.worker.under_ray import SAVE_STEPS, UPDATES, Watching, World

from tunefleet.storage import place
from tunefleet.worker.events import Event, Saved, Started, Stepped

Victim = Literal["worker", "workers", "raylet", "driver", "storage"]

ENGINES: Mapping[str, dict[str, object]] = {
    "plain": {},
    "ZeRO-2": {"deepspeed": "zero2"},
    "ZeRO-3": {"deepspeed": "zero3"},
    "FSDP2": {"sharding": "fsdp2"},
}
CUT_SECONDS = 15.0


@dataclass(frozen=True)
class Blow:
    """One run and what is done to it."""

    method: str
    engine: str
    workers: int
    victim: Victim

    @property
    def updates(self) -> int:
        """Of the run: the quicker its steps, the more there are, so that a blow that is late still hits it."""
        if self.engine != "plain":
            return UPDATES
        return 4 * UPDATES if self.workers == 1 else 2 * UPDATES

    @property
    def name(self) -> str:
        return f"{self.method}-{self.engine}-{self.workers}-{self.victim}"

    def step(self, seed: int) -> int:
        """The step that it comes behind: any between the first two checkpoints but the last before one."""
        return random.Random(f"{seed} {self.name}").randrange(SAVE_STEPS + 1, 2 * SAVE_STEPS - 2)


BLOWS = (
    Blow("full", "plain", 2, "worker"),
    Blow("full", "ZeRO-2", 2, "raylet"),
    Blow("full", "ZeRO-3", 2, "driver"),
    Blow("full", "FSDP2", 2, "storage"),
    Blow("freeze", "plain", 1, "raylet"),
    Blow("freeze", "ZeRO-3", 2, "workers"),
    Blow("freeze", "FSDP2", 2, "driver"),
    Blow("lora_dropout", "plain", 2, "storage"),
    Blow("lora_dropout", "ZeRO-2", 2, "worker"),
    Blow("lora_dropout", "ZeRO-3", 2, "raylet"),
    Blow("lora_dropout", "FSDP2", 2, "worker"),
    Blow("dora", "plain", 2, "driver"),
    Blow("pissa", "plain", 2, "raylet"),
    Blow("galore", "plain", 2, "workers"),
    Blow("galore_layerwise", "plain", 1, "driver"),
    Blow("galore_svd", "plain", 2, "raylet"),
    Blow("badam_ascending", "plain", 2, "storage"),
    Blow("badam_random", "ZeRO-3", 2, "worker"),
    Blow("badam_descending", "FSDP2", 2, "raylet"),
    Blow("badam_scatter", "plain", 1, "worker"),
)


@dataclass(frozen=True)
class Damage:
    """What a blow did to a run that came to its end all the same."""

    TITLES: ClassVar[tuple[str, ...]] = ("method", "engine", "workers", "hit", "behind step", "steps lost")

    blow: Blow
    hit_step: int
    lost_steps: int
    """Steps that were heard of and had to be taken again."""

    def row(self) -> tuple[str, ...]:
        blow = self.blow
        return (
            blow.method,
            blow.engine,
            str(blow.workers),
            blow.victim,
            str(self.hit_step),
            str(self.lost_steps),
        )


class Once:
    """Does something behind a step, once, as soon as a checkpoint is in storage."""

    def __init__(self, step: int, strike: Callable[[Sequence[str]], None]) -> None:
        """Args: strike: what is done, given the node of each worker."""
        self._step, self._strike = step, strike
        self._saved = False
        self._seats: list[str] = []
        self._starts = 0
        self.hit_step: int | None = None
        self.last_step = 0
        """The last step that was heard of before the workers started again."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._seats = [worker.node for worker in event.workers]
            self._starts += 1
        if isinstance(event, Stepped) and self._starts == 1:
            self.last_step = event.step.step
        self._saved = self._saved or isinstance(event, Saved)
        if self.hit_step is None and self._saved and isinstance(event, Stepped) and event.step.step >= self._step:
            self.hit_step = event.step.step
            self._strike(self._seats)


def kill_worker(record: str) -> None:
    """SIGKILL for the process of rank 0, which the run's record names."""
    last = place(record).child("attempts.jsonl").read_text().splitlines()[-1]
    os.kill(json.loads(last)["pid"], signal.SIGKILL)


def kill_all_workers(nodes: RayNodes, seats: Sequence[str]) -> None:
    """SIGKILL for the processes of all ranks at once."""
    assert nodes.kill_workers() == len(seats)


def kill_node(nodes: RayNodes, live: list[str], node: str) -> None:
    """SIGKILL for the raylet of a node; another one takes its place."""
    live.remove(node)
    nodes.kill(node)
    live.append(nodes.add(cpus=1))


def cut(way: Way) -> None:
    """The store is out of reach for a while, from the middle of its next upload on."""
    way.refused_bytes_from = way.passed_bytes + 20_000
    threading.Timer(CUT_SECONDS, way.mend).start()


def run_watched(world: World, keys: dict[str, object], once: Once) -> None:
    """The run in this process, with a blow on the way."""
    from tunefleet.recipe.read import read_flat

    outcome = world.run(read_flat(keys), Watching(once))
    assert outcome.exit_code == 0


def run_with_driver_killed(world: World, keys: dict[str, object], step: int) -> int:
    """The command, SIGKILL for it behind a step once a checkpoint is in storage, and the same command again.

    Returns the step.
    """
    recipe = world.folder / f"{keys['ray_run_name']}.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    command = [str(Path(sys.executable).with_name("tunefleet")), "train", str(recipe)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert driver.stdout is not None
    hit, saved = 0, False
    for line in driver.stdout:
        taken = re.match(r"step (\d+)/", line)
        hit = int(taken[1]) if taken is not None else hit
        saved = saved or line.rstrip().endswith("checkpoint saved")
        if saved and hit >= step:
            driver.kill()
            break
    assert driver.wait(timeout=60) == -signal.SIGKILL, "the run ended before the blow"
    driver.stdout.close()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return hit
