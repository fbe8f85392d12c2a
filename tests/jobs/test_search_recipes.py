"""The searches that are shipped: their spaces are legal, and their trials could start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.launch.test_runs import LAPTOP

from tunefleet.launch.draft import draft
from tunefleet.recipe.tune import read_search
from tunefleet.search.opening import open_space
from tunefleet.search.sizing import trial_keys, trial_recipe

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SEARCHES = sorted(JOBS.glob("search_*.yaml"))

by_name = pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)


def test_the_promised_searches_are_there() -> None:
    assert [path.stem for path in SEARCHES] == ["search_methods", "search_ranks"]


@by_name
def test_every_branch_can_be_planned(path: Path, tmp_path: Path, quickstart_world: Path, tiny_model: Path) -> None:
    words = [f"model_name_or_path={tiny_model}", f"dataset_dir={quickstart_world / 'data'}"]
    search = read_search(path, [*words, f"cache_dir={quickstart_world / 'cache'}"])
    space = open_space(search)
    assert [branch.method.name for branch in space.branches] == ["lora", "galore", "badam"]
    for branch in space.branches:
        keys = trial_keys(branch, next(branch.legal_outlines()), search.keys)
        plan = draft(trial_recipe(keys, "trial", str(tmp_path)), LAPTOP, tmp_path, with_data=False)
        assert plan.batch.global_batch_samples in (8, 16)


def test_ranks_and_intervals_are_searched_each_alone() -> None:
    space = open_space(read_search(JOBS / "search_ranks.yaml"))
    assert [list(branch.domains) for branch in space.branches] == [
        ["lora_rank"],
        ["galore_rank"],
        ["badam_switch_interval"],
    ]
    assert len(list(space.points())) == 12


def test_methods_are_searched_with_their_children() -> None:
    search = read_search(JOBS / "search_methods.yaml")
    assert (search.tune.num_samples, search.tune.search, search.tune.scheduler) == (24, "optuna", "asha")


def test_the_jobs_script_is_the_command() -> None:
    words = [sys.executable, str(JOBS / "tune.py"), str(JOBS / "lora_sft.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("tune: is missing; write tune: with a space")
