"""`make bench-search`: what short trials cost beside their training, warm, cold, and in Ray Tune's own way.

    .venv/bin/python benchmarks/search.py                               16 trials, three rounds
    .venv/bin/python benchmarks/search.py --trials 4 --rounds 1         a look whether it works

Each side is a whole command on a Ray that was just started for it, with two CPUs: its imports count, Ray's start does
not. All sides have one thread a trial and two trials at once, and train the same recipes. Ray Tune's own way is a class
trainable with `reuse_actors` that calls our worker function in its own process. Prints a table, keeps it with every
number behind it in benchmarks/results/, and ends with 1 where a goal is missed.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from beside.measure import markdown_table
from beside.plans import put_plans, short_trials
from scaling import keep, ray_head

from tunefleet.artifacts.metrics import TIMING_FIELDS, read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / ".benchmarks" / "search"
SIDES = ("warm", "reuse_actors", "cold")
TITLES: Mapping[str, str] = {
    "warm": "tunefleet, trial_host: warm",
    "reuse_actors": "class trainable with reuse_actors, our worker function",
    "cold": "tunefleet, trial_host: cold (a TorchTrainer for each trial)",
}
RANKS, RATES = (4, 8, 16, 32), (1e-3, 3e-3, 1e-2, 3e-2)
GOALS: Mapping[str, float] = {"cold": 8.0, "reuse_actors": 1.2}
"""How many times as long as warm trials the other sides must take."""
ENVIRONMENT: Mapping[str, str] = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Lines = list[dict[str, Any]]
"""Of `metrics.jsonl`, without what a clock says."""


@dataclass(frozen=True)
class Measured:
    """One run of a side."""

    seconds: float
    """From the command's start to its exit."""
    training_seconds: float
    """Of the updates alone, mean over the trials."""
    lines: dict[str, Lines]
    """Of each trial, by its name."""


def recipe(side: str, address: str, trials: int, steps: int) -> dict[str, Any]:
    """The search of a side."""
    ranks = RANKS[: max(1, trials // len(RATES))]
    space = {
        "lora_rank": {"choice": list(ranks)},
        "learning_rate": {"choice": list(RATES[: max(1, trials // len(ranks))])},
    }
    return short_trials(FOLDER, side, address, steps, space, at_once=2)


def measure(side: str, trials: int, steps: int) -> Measured:
    """Run a side once, on a Ray of its own.

    Raises:
        SystemExit: it failed; its output is in the folder.
    """
    for leftover in (FOLDER / side, FOLDER / "runs" / side):
        shutil.rmtree(leftover, ignore_errors=True)
    with ray_head() as address:
        file = FOLDER / f"{side}.yaml"
        file.write_text(yaml.safe_dump(recipe(side, address, trials, steps)))
        own = [str(Path(sys.executable).with_name("tunefleet")), "tune", str(file)]
        command = own if side != "reuse_actors" else [sys.executable, str(Path(__file__)), "--own-way", str(file)]
        with (FOLDER / f"{side}.log").open("w") as log:
            began = time.monotonic()
            done = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, check=False)
            seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{side} ended with {done.returncode}: see {FOLDER / side}.log")
    runs = sorted((FOLDER / "runs" / side / "trials").iterdir())
    lines = {run.name: read_metrics(run / "record" / "metrics.jsonl") for run in runs}
    return Measured(
        seconds,
        sum(trained_seconds(one) for one in lines.values()) / len(lines),
        {name: [_exact(line) for line in one] for name, one in lines.items()},
    )


def trained_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a run's updates."""
    seconds, before = 0.0, 0
    for line in lines:
        if "loss" in line:
            seconds += line["workers"]["step_seconds"][0] * (line["step"] - before)
            before = line["step"]
    return seconds


def _exact(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMING_FIELDS}


# ---- Ray Tune's own way ---------------------------------------------------------------------------------------------


def run_own_way(file: Path) -> None:
    """A search by hand: the same plans, and a class trainable that takes one trial after the other."""
    folder, names, address = put_plans(file, REPOSITORY)
    import ray
    from ray import tune

    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    trainable: Any = tune.with_resources(_own_trainable(), {"CPU": 1})
    results = tune.Tuner(
        trainable,
        param_space={
            "trial": tune.grid_search(names),
            "search": folder,
            "import_from": str(Path(__file__).parent),
        },
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=2, metric="eval_loss", mode="min"),
        run_config=tune.RunConfig(name="tune", storage_path=str(FOLDER / "reuse_actors" / "ray"), verbose=0),
    ).fit()
    if results.errors:
        raise SystemExit(str(results.errors[0]))


def _own_trainable() -> Any:
    """The class, made where Ray is wanted; it travels to its actors by value."""
    from ray.tune import Trainable

    class OneProcess(Trainable):
        """Trains in its own process, one trial after the other."""

        def setup(self, config: dict[str, Any]) -> None:
            sys.path.insert(0, config["import_from"])
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._name, self._search = new_config["trial"], new_config["search"]
            return True

        def step(self) -> dict[str, Any]:
            from beside.in_process import run_trial

            return {**run_trial(self._search, self._name), "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None: ...

        def load_checkpoint(self, checkpoint: Any) -> None: ...

    return OneProcess


# ---- what it comes to -----------------------------------------------------------------------------------------------

HEADER = ("side", "whole command, s", "times warm", "s a trial and CPU, beside training", "training a trial, s")


def table(rounds: Mapping[str, Sequence[Measured]], trials: int) -> str:
    """A line for each side: medians over the rounds."""
    warm = median(one.seconds for one in rounds["warm"])
    rows: list[list[str]] = []
    for side, ones in rounds.items():
        seconds = median(one.seconds for one in ones)
        training = median(one.training_seconds for one in ones)
        beside = 2 * seconds / trials - training
        figures = [f"{seconds:.1f}", f"{seconds / warm:.2f}x", f"{beside:.2f}", f"{training:.2f}"]
        rows.append([TITLES[side], *figures])
    return markdown_table(HEADER, rows)


def losses_table(rounds: Mapping[str, Sequence[Measured]]) -> str:
    """The last held-out loss of each trial on each side."""
    sides = list(rounds)
    rows = [
        [name, *(f"{_last_loss(rounds[side][0].lines[name]):.6f}" for side in sides)]
        for name in rounds[sides[0]][0].lines
    ]
    return markdown_table(("held-out loss of", *sides), rows)


def _last_loss(lines: Lines) -> float:
    return float(next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line))


def equal(rounds: Mapping[str, Sequence[Measured]]) -> bool:
    """Whether every trial has the same lines everywhere, bit for bit."""
    every = [one.lines for ones in rounds.values() for one in ones]
    return all(lines == every[0] for lines in every)


def missed(rounds: Mapping[str, Sequence[Measured]]) -> list[str]:
    """The goals that were not reached."""
    warm = median(one.seconds for one in rounds["warm"])
    found = [] if equal(rounds) else ["the losses differ"]
    for side, goal in GOALS.items():
        if side in rounds:
            ratio = median(one.seconds for one in rounds[side]) / warm
            found += (
                [] if ratio >= goal else [f"{side} takes {ratio:.2f} times as long as warm, and the goal is {goal}"]
            )
    return found


def main() -> int:
    """Measure, print, keep; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description="Short trials: warm, cold, and in Ray Tune's own way.")
    parser.add_argument("--trials", type=int, default=16, help="4, 8, 12 or 16 trials a search (16)")
    parser.add_argument("--steps", type=int, default=30, help="updates of a trial (30: about a second)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side takes its turn (3)")
    parser.add_argument("--cold-rounds", type=int, default=1, help="how often the cold side does (1)")
    parser.add_argument("--own-way", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.own_way is not None:
        run_own_way(asked.own_way)
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / "world").is_dir():
        make = [sys.executable, str(REPOSITORY / "jobs" / "prepare_quickstart.py"), "--small", "--to"]
        subprocess.run([*make, str(FOLDER / "world")], check=True, stdout=subprocess.DEVNULL)
    rounds: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for number in range(max(asked.rounds, asked.cold_rounds)):
        for side in SIDES:
            if number < (asked.cold_rounds if side == "cold" else asked.rounds):
                rounds[side].append(measure(side, asked.trials, asked.steps))
                print(f"{side}: {rounds[side][-1].seconds:.1f} s", flush=True)
    done = {side: ones for side, ones in rounds.items() if ones}
    text = "\n\n".join([summary(asked.trials, asked.steps), table(done, asked.trials), losses_table(done)])
    text += f"\n\nEvery line of every trial is the same on all sides, bit for bit: {'yes' if equal(done) else 'NO'}."
    print(f"\n{text}")
    whole = asked.trials >= 16 and asked.rounds >= 3
    keep("search" if whole else "search_quick", text, facts(done))
    goals = missed(done) if whole else []
    print("\n".join(goals))
    return 1 if goals else 0


def summary(trials: int, steps: int) -> str:
    """The sentence above the tables."""
    return (
        f"{trials} LoRA trials of {steps} updates, a Llama of 0.1M parameters, 16 rows an update, two trials at once "
        f"with one thread each on a Ray of two CPUs ({os.cpu_count()} cores here). Whole commands, medians: imports "
        f"count on all sides, Ray's own start on none."
    )


def facts(rounds: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Every number, and what it was measured with; no folder and no name of a machine."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "ray")},
        "cores": os.cpu_count(),
        "sides": {side: [asdict(one) for one in ones] for side, ones in rounds.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
