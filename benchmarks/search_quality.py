"""`make bench-search-quality`: what a search finds, beside what it would have cost to try everything.

    .venv/bin/python benchmarks/search_quality.py               after `make quickstart`; both parts
    .venv/bin/python benchmarks/search_quality.py methods       24 trials over three methods, beside their defaults
    .venv/bin/python benchmarks/search_quality.py asha          asha beside the whole grid, three seeds

Every search is the command `tunefleet tune` on a recipe that is written to `.benchmarks/search_quality/`; one that was
interrupted goes on when this is started again. Prints tables, keeps them with every trial behind them in
benchmarks/results/, and ends with 1 where a goal is missed.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import yaml
from beside.measure import markdown_table

from tunefleet.artifacts.record import read_attempts

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
RECIPE = REPOSITORY / "jobs" / "search_methods.yaml"
FOLDER = Path(".benchmarks") / "search_quality"
METRIC = "eval_loss"

SWEEP = 3
"""Learning rates that each method's defaults are tried with."""
SEEDS = (0, 1, 2)
GRID = {
    "finetuning_type": "lora",
    "bf16": True,
    "lora_rank": {"choice": [4, 16, 64]},
    "learning_rate": {"choice": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]},
}
GRID_KEYS = {"max_steps": 80, "eval_steps": 5, "logging_steps": 5, "save_steps": 80}
RUNGS = {"scheduler": "asha", "grace_steps": 5, "reduction_factor": 4}
"""At 5 and 20 steps of 80 one trial in four goes on. Asha promotes the first that come whatever they are, so with few
points it takes low rungs that are far apart to save most of a grid."""
WORST_OF_BEST, MOST_STEPS, LEAST_SPREAD = 1.01, 0.35, 1.05
"""Goals: asha's best beside the grid's, its steps beside the grid's, and the grid's median beside its best."""

Trial = Mapping[str, Any]
"""A row of `trials.parquet`."""


def tune(name: str, recipe: Mapping[str, object]) -> list[Trial]:
    """Run a search, or go on with it; its trials."""
    home = FOLDER / name
    own = {"output_dir": str(home), "ray_run_name": name, "ray_storage_path": str(FOLDER / "runs")}
    file = REPOSITORY / FOLDER / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**recipe, **own, "overwrite_output_dir": False}, sort_keys=False))
    rows = REPOSITORY / home / "trials.parquet"
    if not rows.is_file():
        command = [str(Path(sys.executable).with_name("tunefleet")), "tune", str(file)]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    trials: list[Trial] = pq.read_table(rows).to_pylist()
    return trials


def whole(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that went to their end, best first."""
    ended = [trial for trial in trials if trial["state"] == "finished" and trial[METRIC] is not None]
    return sorted(ended, key=lambda trial: float(trial[METRIC]))


def best_of(trials: Sequence[Trial], method: str) -> str:
    """What a method's best trial reached; where none went to its end, what the best of those furthest on had then."""
    own = [trial for trial in trials if trial["method"] == method and trial[METRIC] is not None]
    ended = whole(own)
    if ended:
        return f"{ended[0][METRIC]:.4f}"
    stopped = [trial for trial in own if trial["state"] in ("stopped", "cut")]
    furthest = min(stopped, key=lambda trial: (-int(trial["steps"]), float(trial[METRIC])), default=None)
    return "" if furthest is None else f"{furthest[METRIC]:.4f}, stopped after {furthest['steps']} steps"


def rates(domain: Mapping[str, Sequence[float]], count: int) -> list[float]:
    """Learning rates in the middle of `count` equal parts of a log-uniform domain."""
    low, high = (math.log(float(end)) for end in domain["loguniform"])
    return [float(f"{math.exp(low + (high - low) * (part + 0.5) / count):.2g}") for part in range(count)]


def default_branch(branch: Mapping[str, Any]) -> dict[str, Any]:
    """A branch with its method's own defaults, and a sweep of learning rates."""
    fixed = {key: value for key, value in branch.items() if not isinstance(value, dict)}
    return {**fixed, "learning_rate": {"choice": rates(branch["learning_rate"], SWEEP)}}


# ---- one search over three methods ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The best of a search, of a method in it, and of the method's defaults."""

    method: str
    searched: str
    """Held-out loss of the best of the method's trials, in words."""
    trials: int
    defaults: tuple[float, ...]
    """Held-out loss for each learning rate of the sweep."""


def methods() -> tuple[str, dict[str, Any], bool]:
    """The search of `jobs/search_methods.yaml` beside the defaults of each of its methods."""
    recipe = yaml.safe_load(RECIPE.read_text())
    searched = tune("methods", recipe)
    sweep = {"search": "grid", "scheduler": "none", "space": [default_branch(one) for one in recipe["tune"]["space"]]}
    swept = tune("defaults", {**recipe, "tune": sweep})
    found = [
        Found(
            method,
            best_of(searched, method),
            sum(trial["method"] == method for trial in searched),
            tuple(float(trial[METRIC]) for trial in swept if trial["method"] == method and trial[METRIC] is not None),
        )
        for method in dict.fromkeys(str(trial["method"]) for trial in swept)
    ]
    best = float(whole(searched)[0][METRIC])
    reached = best < min(loss for one in found for loss in one.defaults)
    text = markdown_table(
        ("method", "trials", "best of the search", f"its defaults at {SWEEP} learning rates"),
        [
            [
                one.method,
                str(one.trials),
                one.searched,
                ", ".join(f"{loss:.4f}" for loss in one.defaults),
            ]
            for one in found
        ],
    )
    steps, most = (sum(int(trial[key]) for trial in searched) for key in ("steps", "updates"))
    text += (
        f"\nHeld-out loss. {len(searched)} trials, {len(whole(searched))} of them to their end, {steps} steps of {most}"
        f"; best {best:.4f} by {whole(searched)[0]['method']}."
    )
    return text, {"search": searched, "defaults": swept}, reached and len(searched) == recipe["tune"]["num_samples"]


# ---- asha beside the grid -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """A search that stops trials, beside one that does not."""

    best: float
    middle: float
    """Median of the grid."""
    found: float
    steps: int
    all_steps: int

    @property
    def good(self) -> bool:
        """Whether every goal is reached."""
        return (
            self.found <= WORST_OF_BEST * self.best
            and self.steps <= MOST_STEPS * self.all_steps
            and self.middle >= LEAST_SPREAD * self.best
        )

    def row(self, seed: int) -> list[str]:
        """As the table shows it."""
        return [
            str(seed),
            f"{self.best:.4f}",
            f"{self.middle:.4f} ({self.middle / self.best - 1:+.1%})",
            f"{self.found:.4f} ({self.found / self.best - 1:+.2%})",
            f"{self.steps} of {self.all_steps} ({self.steps / self.all_steps:.0%})",
            "yes" if self.good else "no",
        ]


def beside(grid: Sequence[Trial], stopped: Sequence[Trial], steps: int) -> Beside:
    """Set asha's trials beside the grid's."""
    losses = [float(trial[METRIC]) for trial in whole(grid)]
    every = sum(int(trial["steps"]) for trial in grid)
    return Beside(losses[0], median(losses), float(whole(stopped)[0][METRIC]), steps, every)


def executed(name: str, trials: Sequence[Trial]) -> int:
    """Steps that a search has really taken: a trial takes some more until it hears that it is stopped."""
    runs = REPOSITORY / FOLDER / "runs" / name / "trials"
    records = [read_attempts(runs / trial["run"] / "record") for trial in trials]
    return sum(int(str(attempt["executed_steps"])) for attempts in records for attempt in attempts)


def asha() -> tuple[str, dict[str, Any], bool]:
    """The whole grid, and asha on the same points in an order of its own, for each seed."""
    recipe = {key: value for key, value in yaml.safe_load(RECIPE.read_text()).items() if key != "tune"} | GRID_KEYS
    points = math.prod(len(domain["choice"]) for domain in GRID.values() if isinstance(domain, dict))
    seen: dict[int, Beside] = {}
    kept: dict[str, Any] = {}
    for seed in SEEDS:
        common = {**recipe, "seed": seed}
        warm = {"space": [GRID], "trial_host": "warm"}
        grid = tune(f"grid_{seed}", {**common, "tune": {**warm, "search": "grid"}})
        block = {**warm, **RUNGS, "search": "random", "num_samples": points, "search_seed": seed}
        stopped = tune(f"asha_{seed}", {**common, "tune": block})
        steps = executed(f"asha_{seed}", stopped)
        seen[seed] = beside(grid, stopped, steps)
        kept[str(seed)] = {"grid": grid, "asha": stopped, "asha_executed_steps": steps}
    header = ("seed", "grid's best", "grid's median", "asha's best", "asha's steps", "goals reached")
    text = markdown_table(header, [one.row(seed) for seed, one in seen.items()])
    text += (
        f"\nHeld-out loss of {points} points (LoRA: rank and learning rate). Goals: at most {WORST_OF_BEST - 1:.0%} "
        f"above the grid's best, at most {MOST_STEPS:.0%} of its steps, on a grid whose median is at least "
        f"{LEAST_SPREAD - 1:.0%} above its best."
    )
    return text, kept, all(one.good for one in seen.values())


PARTS = {"methods": methods, "asha": asha}


def main() -> int:
    """Run, print, keep; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description="What searches find, beside what trying everything finds.")
    parser.add_argument("part", nargs="?", choices=list(PARTS), help="only this one (both)")
    asked, reached = parser.parse_args().part, True
    for part in PARTS if asked is None else [asked]:
        text, record, good = PARTS[part]()
        reached = reached and good
        print(f"\n{text}\n{'goals reached' if good else 'GOALS MISSED'}", flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"search_{part}.md").write_text(text + "\n")
        (RESULTS / f"search_{part}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
