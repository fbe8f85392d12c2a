"""`make bench-autoscale`: what a search on an autoscaled cluster takes of its nodes, beside plain Ray Tune.

    .venv/bin/python benchmarks/autoscale.py                            seven trials on each side
    .venv/bin/python benchmarks/autoscale.py --trials 2 --steps 60      a look whether it works

Each side is a whole command on a cluster of its own, made of Ray's own autoscaler and nodes of one CPU, which begins
with no node; two trials at once on all sides, the same maximum, the same idle time-out, the same trials by the same
worker function. Node-seconds are counted from each node's start until it has gone, as Ray's books say.
Prints a table, keeps it with every number behind it in benchmarks/results/, and ends with 1 where a goal is missed.
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
from typing import Any

import yaml
from beside.measure import markdown_table
from beside.plans import put_plans, short_trials
from scaling import keep
from search import ENVIRONMENT, trained_seconds

from tunefleet.artifacts.metrics import read_metrics
from tunefleet.shapes import TRIAL_DRIVER

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / ".benchmarks" / "autoscale"
sys.path.insert(0, str(REPOSITORY))  # the cluster is the one of the tests

from tests.autoscaling import Autoscaled, Life, autoscaled, most_together  # noqa: E402

AT_ONCE = 2
TYPES: Mapping[str, Any] = {"cpu": {"resources": {"CPU": 1}, "max_workers": 2 * AT_ONCE}}
"""Twice as many nodes as trials at once: with fewer, the drivers of Ray Tune's defaults would hold all of them and wait
for workers for ever."""
SIDES: Mapping[str, str] = {
    "warm": "tunefleet, trial_host: warm",
    "cold": "tunefleet, trial_host: cold",
    "tuned": "Ray Tune and TorchTrainer, drivers on the head",
    "defaults": "Ray Tune and TorchTrainer, defaults",
}
RANKS, RATES = (4, 8, 16, 32, 64, 128, 256), (1e-2,)
GOALS: Mapping[str, float] = {"defaults": 0.5, "tuned": 0.8}
"""Node-seconds of warm trials, as a share of those of other sides."""
WALL_GOAL = 1.1
"""Wall time of warm trials, as a share of that of the faster other side."""
_GONE_SECONDS = 60.0
"""So long after its time-out a node that has not gone is taken to stay."""


@dataclass(frozen=True)
class Measured:
    """One run of a side."""

    seconds: float
    """From the command's start to its exit."""
    node_seconds: float
    nodes: int
    """That were started."""
    most_nodes: int
    """At the same time."""
    kept: int
    """That were not given back after the search."""
    trial_seconds: float
    """Of all trials' updates."""
    losses: dict[str, float]
    """The last held-out loss of each trial."""


def recipe(side: str, address: str, trials: int, steps: int) -> dict[str, Any]:
    """The search of a side."""
    space = {"lora_rank": {"choice": list(RANKS[:trials])}, "learning_rate": {"choice": list(RATES)}}
    return {**short_trials(FOLDER, side, address, steps, space, AT_ONCE), "ray_node_types": TYPES}


def measure(side: str, trials: int, steps: int, idle_seconds: float) -> Measured:
    """Run a side once, on a cluster of its own.

    Raises:
        SystemExit: it failed; its output is in the folder.
    """
    for leftover in (FOLDER / side, FOLDER / "runs" / side):
        shutil.rmtree(leftover, ignore_errors=True)
    (FOLDER / "home").mkdir(exist_ok=True)
    with autoscaled(
        FOLDER / "home", TYPES, drivers=AT_ONCE, idle_seconds=idle_seconds, variables=ENVIRONMENT
    ) as cluster:
        file = FOLDER / f"{side}.yaml"
        file.write_text(yaml.safe_dump(recipe(side, cluster.address, trials, steps)))
        own = [str(Path(sys.executable).with_name("tunefleet")), "tune", str(file)]
        command = own if side in ("warm", "cold") else [sys.executable, str(Path(__file__)), "--plain", side, str(file)]
        with (FOLDER / f"{side}.log").open("w") as log:
            began = time.monotonic()
            done = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, check=False)
            seconds, ended = time.monotonic() - began, time.time()
        if done.returncode:
            raise SystemExit(f"{side} ended with {done.returncode}: see {FOLDER / side}.log")
        lives = when_gone(cluster, idle_seconds)
    runs = sorted((FOLDER / "runs" / side / "trials").iterdir())
    lines = {run.name: read_metrics(run / "record" / "metrics.jsonl") for run in runs}
    return Measured(
        seconds,
        node_seconds(lives, ended + idle_seconds),
        len(lives),
        most_together(lives),
        sum(life.ended is None for life in lives),
        sum(trained_seconds(one) for one in lines.values()),
        {name: next(line["eval_loss"] for line in reversed(one) if "eval_loss" in line) for name, one in lines.items()},
    )


def when_gone(cluster: Autoscaled, idle_seconds: float) -> list[Life]:
    """All nodes that there have been, when the last one has gone or is taken to stay."""
    until = time.monotonic() + idle_seconds + _GONE_SECONDS
    while cluster.alive() and time.monotonic() < until:
        time.sleep(1)
    return cluster.lives()


def node_seconds(lives: Sequence[Life], first_leave: float) -> float:
    """How long all nodes were there, in sum.

    Args:
        first_leave: the moment, in seconds since the epoch, at which the nodes that stay could have gone at the
            earliest; they are not counted beyond it.
    """
    return sum(life.seconds(first_leave if life.ended is None else life.ended) for life in lives)


# ---- plain Ray Tune -------------------------------------------------------------------------------------------------


def run_plain(side: str, file: Path) -> None:
    """The same trials by a function for each, which starts a TorchTrainer: what Ray's own pages show."""
    search, names, address = put_plans(file, REPOSITORY)
    if side == "tuned":
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # as we have it
    import ray
    from ray import tune

    variables = {"RAY_ADDRESS": address}  # else what frees a stopped trial's workers may ask another cluster
    ray.init(address, runtime_env={"env_vars": variables}, log_to_driver=False, logging_level=logging.ERROR)
    trainable: Any = _driver()
    if side == "tuned":
        trainable = tune.with_resources(trainable, {"CPU": 0, TRIAL_DRIVER: 1})
    results = tune.Tuner(
        trainable,
        param_space={
            "trial": tune.grid_search(names),
            "search": search,
            "storage": str(FOLDER / side / "train"),
            "import_from": str(Path(__file__).parent),
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=AT_ONCE, metric="eval_loss", mode="min"),
        run_config=tune.RunConfig(name="tune", storage_path=str(FOLDER / side / "ray"), verbose=0),
    ).fit()
    if results.errors:
        raise SystemExit(str(results.errors[0]))


def _driver() -> Any:
    """The function of a trial, made where Ray is wanted; it travels to its actor by value."""

    def train_loop(config: dict[str, Any]) -> dict[str, float]:
        sys.path.insert(0, config["import_from"])
        from beside.in_process import run_trial

        return run_trial(config["search"], config["trial"])

    def driver(config: dict[str, Any]) -> None:
        from ray import train, tune
        from ray.train.torch import TorchTrainer

        function: Any = train_loop  # Ray's types know no function that returns something
        trainer = TorchTrainer(
            function,
            train_loop_config=config,
            scaling_config=train.ScalingConfig(num_workers=1),
            run_config=train.RunConfig(name=config["trial"], storage_path=config["storage"]),
        )
        result: Any = trainer.fit()
        tune.report(result.return_value)

    return driver


# ---- what it comes to -----------------------------------------------------------------------------------------------

HEADER = (
    "side",
    "node-seconds",
    "against tuned",
    "against defaults",
    "whole command, s",
    "nodes at once",
    "nodes that stay",
    "training, s",
)


def table(measured: Mapping[str, Measured]) -> str:
    """A line for each side."""
    rows: list[list[str]] = []
    for side, one in measured.items():
        shares = [
            f"{one.node_seconds / measured[other].node_seconds:.0%}" if other in measured else ""
            for other in ("tuned", "defaults")
        ]
        figures = [f"{one.seconds:.0f}", str(one.most_nodes), str(one.kept), f"{one.trial_seconds:.0f}"]
        rows.append([SIDES[side], f"{one.node_seconds:.0f}", *shares, *figures])
    return markdown_table(HEADER, rows)


def bound(measured: Mapping[str, Measured], idle_seconds: float, start_seconds: float) -> float:
    """Node-seconds that no side can be without: its trials' updates, and of each node its start and its time-out."""
    trials = min(one.trial_seconds for one in measured.values())
    return trials + AT_ONCE * (start_seconds + idle_seconds)


def missed(measured: Mapping[str, Measured]) -> list[str]:
    """The goals that were not reached."""
    ours = measured["warm"]
    found = [
        f"{ours.node_seconds / measured[side].node_seconds:.0%} of the node-seconds of {side}; the goal is {goal:.0%}"
        for side, goal in GOALS.items()
        if ours.node_seconds > goal * measured[side].node_seconds
    ]
    fastest = min(measured[side].seconds for side in GOALS)
    if ours.seconds > WALL_GOAL * fastest:
        found.append(f"{ours.seconds / fastest:.0%} of the wall time, and the goal is {WALL_GOAL:.0%}")
    if not equal(measured):
        found.append("the losses differ")
    return found


def equal(measured: Mapping[str, Measured]) -> bool:
    """Whether every trial has the same held-out loss on all sides, bit for bit."""
    every = [one.losses for one in measured.values()]
    return all(losses == every[0] for losses in every)


def summary(trials: int, steps: int, idle_seconds: float) -> str:
    """The sentence above the table."""
    return (
        f"{trials} LoRA trials of {steps} updates on one worker each, {AT_ONCE} at once, on Ray's autoscaler (v2) "
        f"with nodes of one CPU, at most {TYPES['cpu']['max_workers']}, idle time-out {idle_seconds:g} s, on "
        f"{os.cpu_count()} cores, one run of each side. Node-seconds count until a node has gone; one that stays after "
        f"the search is counted as if it had gone when it could. The head is on no side's bill."
    )


def main() -> int:
    """Measure, print, keep; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description="Node-seconds of a search on an autoscaled cluster.")
    parser.add_argument("--trials", type=int, default=len(RANKS), help=f"up to {len(RANKS)} trials a search")
    parser.add_argument("--steps", type=int, default=900, help="updates of a trial (900: about fifteen seconds)")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds after which an idle node goes (20)")
    parser.add_argument("--side", action="append", choices=list(SIDES), default=[], help="only this side")
    parser.add_argument("--plain", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plain is not None:
        run_plain(asked.plain[0], Path(asked.plain[1]))
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / "world").is_dir():
        make = [sys.executable, str(REPOSITORY / "jobs" / "prepare_quickstart.py"), "--small", "--to"]
        subprocess.run([*make, str(FOLDER / "world")], check=True, stdout=subprocess.DEVNULL)
    measured: dict[str, Measured] = {}
    for side in asked.side or SIDES:
        measured[side] = one = measure(side, asked.trials, asked.steps, asked.idle)
        print(f"{side}: {one.node_seconds:.0f} node-seconds, {one.seconds:.0f} s", flush=True)
    whole = not asked.side and asked.trials == len(RANKS)
    text = "\n\n".join(
        [summary(asked.trials, asked.steps, asked.idle), table(measured), bound_line(measured, asked.idle)]
    )
    print(f"\n{text}")
    keep("autoscale" if whole else "autoscale_quick", text, facts(measured))
    goals = missed(measured) if whole else []
    print("\n".join(goals))
    return 1 if goals else 0


START_SECONDS = 5.0
"""What a process that trains takes to import and to load, at the least (seen on two free cores)."""


def bound_line(measured: Mapping[str, Measured], idle_seconds: float) -> str:
    """The sentence below the table."""
    least = bound(measured, idle_seconds, START_SECONDS)
    near = ", ".join(f"{side} {one.node_seconds / least:.2f}" for side, one in measured.items())
    return (
        f"Lower bound: {least:.0f} node-seconds (the updates alone, and for each of {AT_ONCE} nodes {START_SECONDS:g} "
        f"s for one process to start and the idle time-out). Times the bound: {near}. Every trial has the same "
        f"held-out loss on all sides, bit for bit: {'yes' if equal(measured) else 'NO'}."
    )


def facts(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Every number, and what it was measured with; no folder and no name of a machine."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "ray")},
        "cores": os.cpu_count(),
        "sides": {side: asdict(one) for side, one in measured.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
