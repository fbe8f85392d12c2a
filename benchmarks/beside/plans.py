"""Searches of short trials, and their plans in a folder for sides that run the trials themselves."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from tunefleet.launch.cluster import joined_shape
from tunefleet.recipe.tune import read_search
from tunefleet.search.book import Book
from tunefleet.search.opening import open_space
from tunefleet.search.trials import Workshop
from tunefleet.storage import place


def put_plans(file: Path, root: Path) -> tuple[str, list[str], str]:
    """Plan every point of a search. Returns where its folder is, the names of its trials, and the cluster's address."""
    search = read_search(file)
    space = open_space(search)
    settings = space.common_recipe().ray
    address = str(settings.ray_address)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    folder = place(settings.ray_storage_path).child(space.common_recipe().run_name)
    shop = Workshop(space, search.tune, search.keys, joined_shape(settings), root, folder)
    ray.shutdown()
    book = Book(folder)
    for point in space.points():
        plan = shop.plan(point)
        branch = space.branches[point.branch]
        shop.put(book.add(point, branch.name, branch.method.name, 1, plan.batch.updates), plan)
    return folder.uri, [trial.name for trial in book.trials], address


def short_trials(
    folder: Path, side: str, address: str, steps: int, space: Mapping[str, Any], at_once: int
) -> dict[str, Any]:
    """The recipe of a side's search: LoRA trials of some seconds on the quickstart's small model, one worker each.

    Args:
        folder: holds the model and the data in `world`, and takes what sides leave.
        space: what the trials differ in.
        at_once: trials side by side.
    """
    return {
        "model_name_or_path": str(folder / "world" / "init"),
        "dataset": "quickstart_train",
        "dataset_dir": str(folder / "world" / "data"),
        "cache_dir": str(folder / "cache"),
        "cutoff_len": 128,
        "max_samples": 128,
        "eval_dataset": "quickstart_heldout",
        "eval_strategy": "steps",
        "eval_steps": steps,
        "per_device_train_batch_size": 16,
        "max_steps": steps,
        "save_steps": steps,
        "logging_steps": max(1, steps // 4),
        "report_to": "none",
        "plot_loss": False,
        "bf16": False,
        "seed": 7,
        "output_dir": str(folder / side),
        "ray_run_name": side,
        "ray_storage_path": str(folder / "runs"),
        "ray_address": address,
        "ray_init_kwargs": {"runtime_env": {"py_modules": []}},
        "ray_num_workers": 1,
        "resources_per_worker": {"CPU": 1},
        "tune": {
            "search": "grid",
            "max_concurrent_trials": at_once,
            "trial_host": "warm" if side == "warm" else "cold",
            "space": {"finetuning_type": "lora", **space},
        },
    }
