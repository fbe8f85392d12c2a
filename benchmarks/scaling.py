"""`make bench-scaling`: useful tokens per second and bytes sent for each step, on one and two workers.

    .venv/bin/python benchmarks/scaling.py                  every method under every engine that carries it
    .venv/bin/python benchmarks/scaling.py --method lora    only this one; may be repeated

What is run are the cells of `tunefleet methods --matrix` that say yes, each as a whole run, all on one Ray session.
Prints a table and keeps it, with every number behind it, in benchmarks/results/.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from beside.measure import markdown_table
from beside.work import BATCH, Work, make_work
from rich.console import Console

from tunefleet.artifacts.metrics import WORKERS, Line, read_metrics
from tunefleet.errors import Refused, RunFailed
from tunefleet.launch.display import LineDisplay
from tunefleet.launch.train import train
from tunefleet.places import SITES, Site, matrix
from tunefleet.recipe.read import read_flat
from tunefleet_strategies.registry import methods

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
WARM_UP_STEPS = 3
"""Not counted: the first steps fill caches and allocate."""
FP32_BYTES = 4

_HEAD = """
import sys
import ray
context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(context.address_info["address"], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Cell:
    """One method under one engine on so many workers."""

    method: str
    form: str
    engine: str
    workers: int
    keys: Mapping[str, object]


@dataclass(frozen=True)
class Measured:
    """What a cell's run gave, once warm."""

    tokens_per_second: float
    """Real tokens of the global batch, padding apart; median over steps."""
    bytes_sent: float
    """What a worker handed to collectives for a step; median over steps, the most of all workers."""
    memory_peak_bytes: float
    """Resident, the most of all workers."""
    first_loss: float
    last_loss: float


def cells(asked: Sequence[str]) -> list[Cell]:
    """Every cell of the matrix that says yes; a sharding engine is asked on one worker too."""
    sites = {site.label: site for site in SITES}
    found: list[Cell] = []
    for line in matrix():
        if asked and line.method not in asked:
            continue
        for cell in line.cells:
            if cell.refusal is None:
                site = sites[cell.place]
                counts = (site.workers,) if site.sharding is None else (1, site.workers)
                found += [_cell(line.method, line.form, site, workers) for workers in counts]
    return found


def _cell(name: str, form: str, site: Site, workers: int) -> Cell:
    method = next(method for method in methods() if method.name == name)
    settings = method.forms.get(form, {})
    engine = "plain" if site.sharding is None else site.label
    return Cell(name, form, engine, workers, {**method.selector, **settings, **_sharding_keys(site)})


def _sharding_keys(site: Site) -> Mapping[str, object]:
    """What a recipe writes for an engine."""
    if site.sharding is None:
        return {}
    if site.sharding == "fsdp2":
        return {"sharding": "fsdp2"}
    stage = int(site.sharding.removeprefix("zero"))
    automatic = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    return {
        "deepspeed": {
            **automatic,
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": stage},
            # Without it DeepSpeed does not say what it sends. It waits for every collective, as gloo does anyway.
            "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
        }
    }


@contextmanager
def ray_head() -> Iterator[str]:
    """A Ray session with two CPUs, for as long as the block lasts; its address."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    head = subprocess.Popen(
        [sys.executable, "-c", _HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    if head.stdin is None or head.stdout is None:
        raise AssertionError("asked for pipes")
    try:
        yield head.stdout.readline().strip()
    finally:
        head.stdin.close()
        head.wait(timeout=60)


def measure(cell: Cell, work: Work, address: str, root: Path) -> Measured:
    """Run a cell.

    Raises:
        Refused, RunFailed: it does not run.
    """
    shutil.rmtree(root, ignore_errors=True)
    keys: dict[str, object] = {
        "model_name_or_path": str(work.base),
        "dataset_dir": str(work.data),
        "dataset": "ours",
        "template": "mistral",
        "per_device_train_batch_size": BATCH // cell.workers,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "max_steps": work.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        "seed": 1,
        "max_failures": 0,
        "output_dir": str(root / "model"),
        "ray_storage_path": str(root / "runs"),
        "ray_run_name": "scaling",
        "ray_address": address,
        "ray_init_kwargs": {"runtime_env": {"py_modules": []}},
        "ray_num_workers": cell.workers,
        "resources_per_worker": {"CPU": 1},
        **cell.keys,
    }
    with (root.parent / "log.txt").open("w") as log:
        outcome = train(read_flat(keys), LineDisplay(Console(file=log)), REPOSITORY)
    if outcome.exit_code:
        raise SystemExit(outcome.exit_code)  # stopped by a signal: what it has measured by then is no result
    return measured(read_metrics(root / "runs" / "scaling" / "record" / "metrics.jsonl"))


def measured(lines: Sequence[Line]) -> Measured:
    """What the lines of a run that logged each step come to."""
    steps = [line for line in lines if "loss" in line]
    warm = steps[WARM_UP_STEPS:] or steps
    workers: list[dict[str, list[float]]] = [line[WORKERS] for line in warm]
    return Measured(
        tokens_per_second=median(line["tokens_per_second"] for line in warm),
        bytes_sent=median(max(one["bytes_sent"]) for one in workers),
        memory_peak_bytes=max(workers[-1]["memory_peak_bytes"]),
        first_loss=steps[0]["loss"],
        last_loss=steps[-1]["loss"],
    )


HEADER = (
    *("method", "engine", "workers", "useful tokens/s", "against 1 worker"),
    *("MB sent a step", "of all weights", "peak GiB"),
)


def table(outcomes: Sequence[tuple[Cell, Measured | str]], parameters: int) -> str:
    """The outcomes as Markdown: what was measured, or why a cell was refused."""
    alone = {
        (cell.method, cell.form, cell.engine): one.tokens_per_second
        for cell, one in outcomes
        if cell.workers == 1 and isinstance(one, Measured)
    }
    rows: list[list[str]] = []
    for cell, one in outcomes:
        name = f"{cell.method}, `{cell.form}`" if cell.form else cell.method
        start = [name, cell.engine, str(cell.workers)]
        if isinstance(one, str):
            rows.append([*start, one, "", "", "", ""])
            continue
        single = alone.get((cell.method, cell.form, cell.engine))
        rows.append(
            [
                *start,
                f"{one.tokens_per_second:.0f}",
                "" if single is None else f"{one.tokens_per_second / single:.2f}x",
                f"{one.bytes_sent / 1e6:.2f}",
                f"{one.bytes_sent / (FP32_BYTES * parameters):.1%}",
                f"{one.memory_peak_bytes / 2**30:.2f}",
            ]
        )
    return markdown_table(HEADER, rows)


def summary(work: Work) -> str:
    """The sentence above the table."""
    return (
        f"{os.cpu_count()} cores, one thread a worker, so that two workers leave no core for anything else; gloo over "
        f"loopback. Llama of {work.parameters / 1e6:.1f}M parameters, {BATCH} rows a step on all workers together, "
        f"{work.steps} steps, the first {WARM_UP_STEPS} not counted, median over the others, one run of each. *Of all "
        f"weights*: bytes that a worker hands to collectives for a step / fp32 bytes of the whole model."
    )


def main() -> int:
    """Measure, print, keep; 1 where a cell that the matrix allows failed."""
    parser = argparse.ArgumentParser(description="Tokens per second and bytes sent on one and two workers.")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of 8 rows each (12)")
    parser.add_argument("--method", action="append", default=[], help="only this method; may be repeated (all)")
    asked = parser.parse_args()
    root = REPOSITORY / ".benchmarks" / "scaling"
    work = make_work(root / "work", asked.steps)
    outcomes: list[tuple[Cell, Measured | str]] = []
    failed = False
    with ray_head() as address:
        for cell in cells(asked.method):
            began = time.monotonic()
            try:
                outcome: Measured | str = measure(cell, work, address, root / "run")
            except Refused as error:
                outcome = f"refused: {error}"
            except RunFailed as error:
                outcome, failed = f"failed: {error}", True
            outcomes.append((cell, outcome))
            seconds = time.monotonic() - began
            print(f"{cell.method} {cell.form} {cell.engine} {cell.workers}: {outcome}, {seconds:.0f} s", flush=True)
    text = f"{summary(work)}\n\n{table(outcomes, work.parameters)}"
    print(f"\n{text}")
    keep("scaling_some" if asked.method else "scaling", text, facts(outcomes))
    return 1 if failed else 0


def facts(outcomes: Sequence[tuple[Cell, Measured | str]]) -> dict[str, Any]:
    """Every number, and what it was measured with; no folder and no name of a machine."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "ray", "deepspeed")},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "cells": [
            {**asdict(cell), "outcome": outcome if isinstance(outcome, str) else asdict(outcome)}
            for cell, outcome in outcomes
        ],
    }


def keep(name: str, text: str, record: Mapping[str, object]) -> None:
    """Write the table and every number behind it into RESULTS."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
