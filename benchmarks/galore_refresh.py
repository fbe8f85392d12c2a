"""How GaLore's bases are best found: time, captured energy and held-out loss of `svd`, `eigh` and `subspace`.

    .venv/bin/python benchmarks/galore_refresh.py                         after `make quickstart`
    .venv/bin/python benchmarks/galore_refresh.py galore_rank=64 max_steps=100

Trains the quickstart's base model with `jobs/galore_sft.yaml` once for each way, in this process and on one thread. The
run with `svd` keeps its gradients at every refresh; the other two find their bases for the same gradients again, from
the basis of the refresh before, as they would in a run. Prints a table in markdown.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from tunefleet.launch.cluster import local_shape
from tunefleet.launch.draft import draft
from tunefleet.recipe.read import read_recipe
from tunefleet.training.determinism import pin
from tunefleet.worker.build import Trainee, build, open_data
from tunefleet.worker.seat import Seat
from tunefleet.worker.start import Start
from tunefleet_strategies.optim.projection import Basis, Projection, Refresh, exact_energy, find_basis, side_of

REPOSITORY = Path(__file__).resolve().parents[1]
REPETITIONS = 5
SETTINGS = ("max_steps=60", "galore_update_interval=20", "eval_on_start=false", "eval_strategy=no", "do_eval=true")


@dataclass
class Way:
    """What was seen of one way of finding bases."""

    seconds: list[float] = field(default_factory=list)
    """Of all bases of one refresh, the first one apart, which is exact for every way."""
    captured: list[float] = field(default_factory=list)
    """Energy of each basis as a part of the exact one's."""
    fell_back: int = 0
    losses: tuple[float, float] = (0.0, 0.0)
    """Of the last update, and of the held-out rows."""


def trainee(refresh: Refresh, overrides: Sequence[str], scratch: Path) -> Trainee:
    """The run of a recipe at its beginning, as a worker builds it."""
    words = [*SETTINGS, *overrides, f"galore_refresh={refresh}", f"ray_storage_path={scratch}", "seed=0"]
    recipe = read_recipe(REPOSITORY / "jobs" / "galore_sft.yaml", words)
    plan = draft(recipe, local_shape(recipe.ray), REPOSITORY)
    return build(plan, Seat(0, 1, torch.device("cpu")), open_data(plan), Start())


def train(run: Trainee, interval: int) -> tuple[list[list[Tensor]], tuple[float, float]]:
    """Train to the end; return the gradients of the projected matrices at every refresh, and both losses."""
    optimizer = run.engine.optimizer
    matrices: list[Tensor] = [p for group in optimizer.param_groups if group["rank"] for p in group["params"]]
    kept: list[list[Tensor]] = []
    updates = 0

    def keep(*_: object) -> None:
        nonlocal updates
        if updates % interval == 0:
            kept.append([matrix.grad.detach().clone() for matrix in matrices if matrix.grad is not None])
        updates += 1

    optimizer.register_step_pre_hook(keep)
    last = 0.0
    for step in run.steps(lambda: False):
        last = step.loss
    return kept, (last, run.evaluate())


def find_again(way: Way, refresh: Refresh, kept: Sequence[Sequence[Tensor]], projection: Projection, rank: int) -> None:
    """Find the bases of kept gradients, and add what that took and gave."""
    before: list[Basis | None] = [None] * len(kept[0])
    for number, gradients in enumerate(kept):
        sides = [side_of(projection, *gradient.shape) for gradient in gradients]
        asked = list(zip(gradients, sides, before, strict=True))
        took: list[float] = []
        for _ in range(REPETITIONS):
            began = time.perf_counter()
            found = [find_basis(gradient, side, rank, refresh, basis) for gradient, side, basis in asked]
            took.append(time.perf_counter() - began)
        before = [basis for basis, _ in found]
        if number == 0:
            continue
        way.seconds.append(statistics.median(took))
        way.fell_back += sum(fell_back for _, fell_back in found)
        for gradient, (basis, _) in zip(gradients, found, strict=True):
            way.captured.append(float(basis.project(gradient).square().sum() / exact_energy(gradient, rank)))


def main() -> None:
    pin(1)
    ways: dict[Refresh, Way] = {}
    gradients: list[list[Tensor]] = []
    projection: Projection = "std"
    rank = 0
    with tempfile.TemporaryDirectory() as scratch:
        for refresh in get_args(Refresh):
            run = trainee(refresh, sys.argv[1:], Path(scratch))
            group = next(group for group in run.engine.optimizer.param_groups if group["rank"])
            projection, rank = group["projection"], group["rank"]
            kept, losses = train(run, group["update_interval"])
            gradients = gradients or kept
            ways[refresh] = Way(losses=losses)
    for refresh, way in ways.items():
        find_again(way, refresh, gradients, projection, rank)
    print(f"{len(gradients[0])} matrices, rank {rank}, {len(gradients) - 1} refreshes after the first, one thread\n")
    print("| `galore_refresh` | ms for all bases | energy, mean (worst) | fell back | last loss | held-out loss |")
    print("|---|---|---|---|---|---|")
    for refresh, way in ways.items():
        energy = f"{statistics.fmean(way.captured):.4f} ({min(way.captured):.4f})"
        last, held_out = way.losses
        milliseconds = 1000 * statistics.median(way.seconds)
        print(f"| `{refresh}` | {milliseconds:.0f} | {energy} | {way.fell_back} | {last:.3f} | {held_out:.3f} |")


if __name__ == "__main__":
    main()
