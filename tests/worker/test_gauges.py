"""What Prometheus finds at a Ray node while a run goes on."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from tests.worker.under_ray import Watching, World

from tunefleet.worker.events import Event, Logged

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

_HEAD = """
import sys
import ray
context = ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
    _metrics_export_port=int(sys.argv[1]), _system_config={"metrics_report_interval_ms": 500},
)
print(context.address_info["address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def metrics_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def head(metrics_port: int) -> Iterator[str]:
    """The address of a Ray head of this test's own, with its metrics at `metrics_port`."""
    command = [sys.executable, "-c", _HEAD, str(metrics_port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(timeout=60)


class Scraper:
    """Looks at the endpoint at each logged line, until everything that is looked for was seen at once."""

    def __init__(self, port: int, wanted: set[tuple[str, str]]) -> None:
        self._port, self._wanted = port, wanted
        self.seen: dict[tuple[str, str], tuple[dict[str, str], float]] = {}
        self.complete = False
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Logged) or self.complete or time.monotonic() - self._last < 0.5:
            return
        self._last = time.monotonic()
        with urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for name, labels, value in re.findall(r"^ray_(tunefleet_\w+){(.*)} (\S+)$", text, re.MULTILINE):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            self.seen[name, tags["rank"]] = (tags, float(value))
        self.complete = self._wanted <= self.seen.keys()


@pytest.mark.slow
def test_prometheus_finds_every_workers_figures_while_the_run_goes_on(
    tmp_path: Path, tiny_model: Path, quickstart_world: Path, head: str, metrics_port: int
) -> None:
    own = ("step", "step_seconds", "compute_seconds", "data_wait_seconds", "tokens_per_second", "memory_peak_bytes")
    of_the_run = ("loss", "grad_norm", "learning_rate")
    wanted = {(f"tunefleet_{name}", rank) for name in (*own, "tokens_total") for rank in ("0", "1")}
    wanted |= {(f"tunefleet_{name}", "0") for name in of_the_run}
    scraper = Scraper(metrics_port, wanted)
    world = World(tmp_path, tiny_model, quickstart_world, head)
    recipe = world.recipe("watched", "lora_dropout", 2, max_steps=300, save_strategy="no", max_samples=40)
    world.run(recipe, Watching(scraper))

    assert scraper.complete, f"never seen: {sorted(wanted - scraper.seen.keys())}"
    assert not {key for key in scraper.seen if key[1] == "1"} & {(f"tunefleet_{name}", "1") for name in of_the_run}
    for tags, value in scraper.seen.values():
        assert (tags["run"], tags["node"]) == ("watched", socket.gethostname())
        assert value > 0
    assert 0 < scraper.seen["tunefleet_step", "1"][1] <= 300
    assert scraper.seen["tunefleet_memory_peak_bytes", "0"][1] > 50 * 2**20
