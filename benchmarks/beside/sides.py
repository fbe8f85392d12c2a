"""The sides of the comparison: what each is asked, and how its run is read afterwards.

Every side is given the same rows and visits the same ones of them, from the same weights, at the same learning rate and
batch. The peer is given the rows in the order in which we visit them and told not to shuffle. Packing, which is the
peer's own, changes the order.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from beside.commands import Timed, run_timed
from beside.measure import Run, intervals
from beside.work import BATCH, SEED, Work

LEARNING_RATE = 1e-4
OWN_RUN_NAME = "beside"
TRIAL_STEPS = 2


@dataclass(frozen=True)
class Commands:
    """Where the two programs are, and the folder of their runs and caches."""

    tunefleet: Path
    llamafactory: Path
    root: Path


@dataclass(frozen=True)
class Side:
    """One column of the comparison: a program with its settings."""

    name: str
    is_peer: bool
    arithmetic: str  # what it computes in, as the program decides it on this work
    batch: str
    settings: Mapping[str, object]  # beyond `common_settings`

    @property
    def packs(self) -> bool:
        """True where the side itself decides which rows stand in a step."""
        return bool(self.settings.get("neat_packing"))

    @property
    def slug(self) -> str:
        """Its name as a folder."""
        return self.name.replace(" ", "_").replace(",", "")


def packed_length(work: Work) -> int:
    """Return the length at which the peer's packed row is as large as our step: BATCH mean rows, a multiple of 8.

    The peer cannot pack to another length (it pads inputs to a multiple of 8, but not their positions).
    """
    mean = work.tokens / len(work.tokens_of_step)
    return 8 * (max(int(mean), work.longest) // 8 + 1)


def sides(work: Work) -> tuple[Side, ...]:
    """Return the sides in the order of their turns: peer, we, peer at its best, we in the peer's arithmetic."""
    length = packed_length(work)
    best = {
        "disable_gradient_checkpointing": True,
        "bf16": True,
        "use_cpu": True,
        "neat_packing": True,
        "cutoff_len": length,
        "per_device_train_batch_size": 1,
    }
    rows = f"{BATCH} rows"
    return (
        Side("LLaMA-Factory, defaults", True, "fp32", f"{rows}, padded", {"disable_shuffling": True}),
        Side("tunefleet, defaults", False, "bf16", f"{rows}, end to end", {}),
        Side("LLaMA-Factory, best", True, "bf16", f"1 packed row of {length}", best),
        Side("tunefleet, fp32", False, "fp32", f"{rows}, end to end", {"bf16": False}),
    )


def common_settings(work: Work, method: str) -> dict[str, object]:
    """Return the keys that both programs read alike; `method` is `lora` or `full`."""
    start: dict[str, object] = {"adapter_name_or_path": str(work.adapter)} if method == "lora" else {}
    return start | {
        "model_name_or_path": str(work.base),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": method,
        "dataset_dir": str(work.data),
        "template": "mistral",
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "max_steps": work.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "overwrite_output_dir": True,
    }


def run_side(side: Side, work: Work, method: str, commands: Commands, *, trial: bool) -> Run:
    """Run a side once in a fresh output folder and return what it gave.

    A trial does TRIAL_STEPS steps only: it fills caches and is not counted.
    """
    output = output_folder(side, method, commands)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    settings = common_settings(work, method) | {"output_dir": str(output / "model")} | dict(side.settings)
    if trial:
        settings["max_steps"] = TRIAL_STEPS
    return run_peer(side, settings, work, commands, output) if side.is_peer else run_ours(settings, commands, output)


def output_folder(side: Side, method: str, commands: Commands) -> Path:
    """Return the folder of a side's latest run; its trained weights are in `model` below it."""
    return commands.root / "runs" / f"{method}_{side.slug}"


def run_peer(side: Side, settings: Mapping[str, object], work: Work, commands: Commands, output: Path) -> Run:
    """Run LLaMA-Factory; its clock is the arrival of its log lines: one for each step, flushed at once."""
    asked = {**settings, "dataset": "peer", "disable_tqdm": True, "include_num_input_tokens_seen": "non_padding"}
    recipe = output / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(asked))
    caches = {"HF_DATASETS_CACHE": str(commands.root / "datasets"), "HF_HOME": str(commands.root / "hub")}
    timed = run_timed([str(commands.llamafactory), "train", str(recipe)], output / "log.txt", caches)
    return read_peer(side, timed, output / "model" / "trainer_state.json", work)


def read_peer(side: Side, timed: Timed, state: Path, work: Work) -> Run:
    """Read losses and norms as the peer's trainer kept them, and check that it read the tokens that we count.

    Raises:
        SystemExit: the peer read other tokens than we, so that the comparison would mean nothing.
    """
    kept = json.loads(state.read_text())
    steps = [line for line in kept["log_history"] if "loss" in line]
    stamps = timed.arrivals("{'loss'")
    tokens = (
        packed_tokens(timed, work, len(steps)) if side.packs else tuple(map(float, work.tokens_of_step[: len(steps)]))
    )
    if not side.packs and kept["num_input_tokens_seen"] != sum(tokens):
        raise SystemExit(f"{side.name} read {kept['num_input_tokens_seen']} tokens where {sum(tokens):.0f} were given.")
    losses = tuple(float(line["loss"]) for line in steps)
    grad_norms = tuple(float(line["grad_norm"]) for line in steps)
    return Run(timed.wall_seconds, intervals(stamps), tokens, losses, grad_norms)


def packed_tokens(timed: Timed, work: Work, steps: int) -> tuple[float, ...]:
    """Return the real tokens of each step where a step is one packed row: their mean over all rows that were packed."""
    said = next(match for _, text in timed.lines if (match := re.search(r"Num examples = ([\d,]+)", text)))
    return (work.epoch_tokens / int(said[1].replace(",", "")),) * steps


def run_ours(settings: Mapping[str, object], commands: Commands, output: Path) -> Run:
    """Run tunefleet on a local Ray that it starts itself: one worker with one CPU, hence one thread."""
    asked = {
        **settings,
        "dataset": "ours",
        "ray_num_workers": 1,
        "resources_per_worker": {"CPU": 1},
        "ray_storage_path": str(output / "storage"),
        "ray_run_name": OWN_RUN_NAME,
        "cache_dir": str(commands.root / "tokens"),
    }
    recipe = output / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(asked))
    timed = run_timed([str(commands.tunefleet), "train", str(recipe)], output / "log.txt", {})
    return read_ours(timed, output / "model" / "metrics.jsonl")


def read_ours(timed: Timed, metrics: Path) -> Run:
    """Read our own records: one line for each step, with the tokens and the seconds since the run began."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    ends = [{"tokens": 0, "seconds": 0.0}, *steps]
    return Run(
        wall_seconds=timed.wall_seconds,
        step_seconds=intervals([line["seconds"] for line in ends]),
        step_tokens=intervals([float(line["tokens"]) for line in ends]),
        losses=tuple(line["loss"] for line in steps),
        grad_norms=tuple(line["grad_norm"] for line in steps),
    )
