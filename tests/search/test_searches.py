"""Searches under Ray Tune: where trials are placed, who is stopped, what is left, and how they go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from tests.search.herd import herd
from tests.search.under_tune import (
    LORA,
    RATIO,
    Watching,
    all_given_back,
    attempts,
    folder,
    kept,
    kill_trials,
    search_keys,
    searched,
    until,
    worker_groups,
)
from tests.worker.under_ray import World

from tunefleet.artifacts.metrics import read_metrics
from tunefleet.errors import Refused, RunFailed
from tunefleet.recipe.read import read_recipe
from tunefleet.search.book import Book
from tunefleet.search.searchers import PACKAGES
from tunefleet.search.tuner import SearchOutcome, tune

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

KILLED = ("killed", "failed: ActorDiedError")
"""How an attempt ends whose driver is killed: it may miss the driver before it dies itself."""


def run(world: World, space: Any, react: Any = None, **more: Any) -> tuple[SearchOutcome, Watching]:
    display = Watching(react)
    return tune(searched(world, space, **more), display, world.folder), display


class Surveyor:
    """Notes the worker bundles that Ray has placed while each trial reports."""

    def __init__(self) -> None:
        self.groups: set[tuple[int, ...]] = set()

    def __call__(self, book: Book) -> None:
        if any(trial.state == "running" for trial in book.trials):
            self.groups.add(tuple(sorted(len(group) for group in worker_groups())))


def test_each_trial_is_placed_by_what_was_sampled_and_the_best_comes_home(world: World) -> None:
    """Two workers were wished: LoRA gets them and ratio mode gets one."""
    surveyor = Surveyor()
    space = [{**LORA, "lora_rank": {"choice": [4]}}, {**RATIO, "badam_switch_interval": {"choice": [5]}}]
    outcome, display = run(world, space, surveyor)
    assert outcome.exit_code == 0
    lora, ratio = outcome.book.trials
    assert (lora.workers, ratio.workers) == (2, 1)
    assert [one.why for one in display.plans] == [None, "badam with badam_mode: ratio runs on 1"]
    bundles = {count for counts in surveyor.groups for count in counts}
    assert bundles == {1, 2}
    assert all_given_back(world)

    assert [attempts(world, trial.name)[0]["world_size"] for trial in (lora, ratio)] == [2, 1]
    assert [[report["step"] for report in trial.reports] for trial in (lora, ratio)] == [[10, 20, 30, 40]] * 2
    # The same samples in every update, whoever trains: what is counted is the same.
    assert lora.reports[-1]["tokens"] == ratio.reports[-1]["tokens"]

    home = world.folder / "search"
    best = min(outcome.book.trials, key=lambda trial: trial.last("eval_loss") or 9)
    recipe = read_recipe(home / "best.yaml")
    assert recipe.method.name == best.method
    assert recipe.ray.ray_num_workers == best.workers
    assert {"trials.parquet", "best_so_far.png", "trials.png", "metrics.jsonl", "best_of"} <= {
        file.name for file in home.iterdir()
    }
    assert {file.name for file in (home / "best_of").iterdir()} == {"lora.yaml", "badam.yaml"}
    assert pq.read_table(home / "trials.parquet").num_rows == 2
    assert any(home.glob("*.safetensors"))
    with pytest.raises(Refused, match="The search search is finished"):
        run(world, space)


@pytest.mark.slow
def test_the_best_recipe_trains_to_the_same_loss(world: World) -> None:
    outcome, _ = run(world, [LORA], tune={"search": "random", "num_samples": 1})
    (trial,) = outcome.book.trials
    keys = yaml.safe_load((world.folder / "search" / "best.yaml").read_text())
    assert keys["output_dir"].endswith("search-best")
    again = world.run(read_recipe(world.folder / "search" / "best.yaml"))
    assert again.summary["eval_loss"] == trial.last("eval_loss")


@pytest.mark.slow
def test_trials_that_asha_stops_free_their_workers_at_once(world: World) -> None:
    """On a cluster whose dashboard is off, so that nobody but the trial itself can have freed them."""
    leaks: list[int] = []

    def react(book: Book) -> None:
        running = sum(trial.state == "running" for trial in book.trials)
        leaks.append(len(worker_groups()) - running)

    rates = {"finetuning_type": "full", "learning_rate": {"choice": [1e-2, 3e-5, 1e-5, 3e-6]}}
    outcome, _ = run(world, [rates], react, tune={"scheduler": "asha", "max_concurrent_trials": 1})
    states = [trial.state for trial in outcome.book.trials]
    assert states[0] == "finished"
    assert states.count("stopped") >= 2
    for trial in outcome.book.trials:
        if trial.state == "stopped":
            assert attempts(world, trial.name)[-1]["executed_steps"] < 40
            assert not (folder(world) / "trials" / trial.name / "record" / "result.json").exists()
    # A stopped trial's group may be seen for as long as its workers say goodbye, never two of them.
    assert max(leaks) <= 1
    assert all_given_back(world)


@pytest.mark.slow
def test_a_trial_that_explodes_is_recorded_with_its_error_and_the_search_goes_on(world: World) -> None:
    space = [{"finetuning_type": "full", "learning_rate": {"choice": [1e30, 1e-3]}, "max_grad_norm": 0}]
    outcome, _ = run(world, space, tune={"max_concurrent_trials": 1})
    exploded, fine = outcome.book.trials
    assert (exploded.state, fine.state) == ("failed", "finished")
    assert exploded.error is not None
    assert "not finite" in exploded.error
    assert "lower learning_rate" in exploded.error


@pytest.mark.slow
def test_a_search_without_a_whole_trial_fails_with_its_first_error(world: World) -> None:
    space = [{"finetuning_type": "full", "learning_rate": {"choice": [1e30]}, "max_grad_norm": 0}]
    with pytest.raises(
        RunFailed, match=r"None of the 1 trials went to its end, the first of the errors is .*not finite"
    ):
        run(world, space)


@pytest.mark.slow
@pytest.mark.parametrize("search", ["optuna", "hyperopt", "bohb"])
def test_hyperband_ends_with_whole_trials_and_nothing_left(world: World, search: str) -> None:
    for package in PACKAGES.get(search, ()):
        pytest.importorskip(package)
    rates = {"finetuning_type": "full", "learning_rate": {"loguniform": [1e-5, 1e-2]}}
    settings = {"search": search, "scheduler": "hyperband", "num_samples": 4, "reduction_factor": 2}
    outcome, _ = run(world, [rates], tune=settings, ray_num_workers=1)
    states = [trial.state for trial in outcome.book.trials]
    assert len(states) == 4
    assert set(states) <= {"finished", "stopped"}
    assert "finished" in states
    assert all_given_back(world)


@pytest.mark.slow
def test_a_tournament_repeats_the_best_of_each_method_under_other_seeds_and_names_the_winner(world: World) -> None:
    """LoRA's rates are hopeless, so full tuning wins; its better rate is its finalist."""
    space = [
        {"finetuning_type": "lora", "ray_num_workers": 1, "learning_rate": {"choice": [1e-7, 2e-7]}},
        {"finetuning_type": "full", "ray_num_workers": 1, "learning_rate": {"choice": [1e-6, 3e-3]}},
    ]
    block = {"search": "random", "num_samples": 4, "scheduler": "asha", "tournament": True, "finalist_seeds": 2}
    outcome, _ = run(world, space, tune=block)
    sampled, repeats = outcome.book.trials[:4], outcome.book.trials[4:]
    assert [trial.branch_name for trial in sampled].count("lora") == 2
    assert [trial.state for trial in repeats] == ["finished"] * 4
    assert sorted((trial.branch_name, trial.seed) for trial in repeats) == [
        ("full", 8),
        ("full", 9),
        ("lora", 8),
        ("lora", 9),
    ]
    told = json.loads((world.folder / "search" / "tournament.json").read_text())
    assert told["winner"] == "full"
    (full,) = (one for one in told["methods"] if one["method"] == "full")
    finalist = outcome.book.trials[full["finalist"] - 1]
    assert finalist.values == {"learning_rate": 3e-3}
    # Other seeds, so other losses; each is that of its own run.
    assert len({*full["values"], finalist.last("eval_loss")}) == 3
    assert full["values"] == [trial.last("eval_loss") for trial in repeats if trial.branch_name == "full"]
    best = read_recipe(world.folder / "search" / "best.yaml")
    assert (best.method.name, best.training.learning_rate, best.training.seed) == ("full", 3e-3, 7)
    assert all_given_back(world)


TURNS: dict[str, Any] = {"scheduler": "pbt", "perturbation_interval": 10}


def record(world: World, trial: str) -> Path:
    return folder(world) / "trials" / trial / "record"


def losses(world: World, trial: str) -> dict[int, float]:
    return {
        line["step"]: line["loss"] for line in read_metrics(record(world, trial) / "metrics.jsonl") if "loss" in line
    }


@pytest.mark.slow
def test_the_worst_of_a_population_goes_on_from_the_best(world: World) -> None:
    space = [{**RATIO, "badam_switch_interval": 7, "learning_rate": {"choice": [1e-6, 1e-3]}}]
    outcome, display = run(world, space, tune=TURNS, logging_steps=1, max_steps=20)
    heir, donor = outcome.book.trials  # the small rate learns nothing
    assert {heir.state, donor.state} == {"finished"}
    (exploit,) = heir.exploits
    assert (exploit["step"], exploit["donor"], donor.exploits) == (10, donor.number, [])
    assert heir.values == exploit["values"] != donor.values
    (came,) = json.loads((record(world, heir.name) / "lineage.json").read_text())
    assert (came["from"], came["values"]) == (donor.name, heir.values)
    # The next loss is that of the donor's weights on the batch that the donor has there too; then they part.
    assert losses(world, heir.name)[11] == losses(world, donor.name)[11]
    assert losses(world, heir.name)[20] != losses(world, donor.name)[20]
    for trial in (heir, donor):
        done = [(one["start_step"], one["executed_steps"]) for one in attempts(world, trial.name)]
        assert done == [(0, 10), (10, 10)]
        assert [report["step"] for report in trial.reports] == [10, 20]
    assert [note for note in display.notes if "goes on from trial" in note]
    assert all_given_back(world)


@pytest.mark.slow
def test_a_population_whose_driver_is_killed_ends_as_one_that_was_left_alone(world: World) -> None:
    """Killed when the heir trains again. Its twin is trained in this process, without Ray."""
    space = [{"finetuning_type": "lora", "lora_rank": {"choice": [4, 6]}, "ray_num_workers": 1}]
    more: dict[str, Any] = {"learning_rate": 1e-3, "max_steps": 20, "save_steps": 5}
    words = command(world, "search", space, tune=TURNS, **more)
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)

    def training_again() -> bool:
        made = folder(world) / "trials.json"
        heirs = [trial["name"] for trial in kept(world) if trial["exploits"]] if made.is_file() else []
        return any(len(attempts(world, heir)) == 2 for heir in heirs)

    assert until(training_again, 300)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(timeout=60)
    assert not all(trial["state"] == "finished" for trial in kept(world))
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    killed = kept(world)

    (world.folder / "runs" / "search").rename(world.folder / "runs" / "killed")
    twin = herd(world, space, real=True, **more)
    twin.population().turn(list(twin.book.trials))
    ends = [twin.train(trial, None)["eval_loss"] for trial in twin.book.trials]
    assert [trial["reports"][-1]["eval_loss"] for trial in killed] == ends
    assert [trial["exploits"] for trial in killed] == [trial.exploits for trial in twin.book.trials]
    assert sum(len(trial.exploits) for trial in twin.book.trials) == 1


@pytest.mark.slow
def test_the_budget_ends_a_search_and_what_ran_to_its_end_counts(world: World) -> None:
    display = Watching()
    search = searched(
        world, [LORA], tune={"budget": {"hours": 1e-5}, "max_concurrent_trials": 1}, max_steps=4000, eval_steps=1000
    )
    with pytest.raises(RunFailed, match="went to its end"):
        tune(search, display, world.folder)
    assert any("budget is spent" in note for note in display.notes)
    assert {trial["state"] for trial in kept(world)} == {"cut"}


def command(world: World, name: str, space: Any, **more: Any) -> list[str]:
    recipe = world.folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(search_keys(world, space, **more)))
    return [str(Path(sys.executable).with_name("tunefleet")), "tune", str(recipe)]


LONG: dict[str, Any] = {"max_steps": 400, "save_steps": 20, "eval_steps": 100, "tune": {"max_concurrent_trials": 1}}
RANKS = [{**LORA, "lora_rank": {"choice": [4, 8]}}]


OWN_RAY: dict[str, Any] = {"ray_address": None, "ray_init_kwargs": {"num_cpus": 2}}
WARM: dict[str, Any] = {"ray_num_workers": 1, "tune": {"max_concurrent_trials": 1, "trial_host": "warm"}}


def killed_in_second_trial(world: World, sent: signal.Signals, **more: Any) -> tuple[list[str], int, str]:
    """A search whose driver gets a signal while its second trial trains; its first trial is over."""
    words = command(world, "search", RANKS, **{**LONG, **more})
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    second = ""

    def training() -> bool:
        nonlocal second
        if not (folder(world) / "trials.json").is_file():
            return False
        trials = kept(world)
        second = trials[1]["name"] if len(trials) > 1 else ""
        checkpoints = folder(world) / "trials" / (second or "none") / "checkpoints"
        return checkpoints.is_dir() and any(checkpoints.glob("step_*/complete.json"))

    assert until(training, 300)
    started = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, sent)
    code = driver.wait(timeout=120)
    # Ray, where the search had started it, ends with the search, whatever ended that.
    assert until(lambda: not any(process.is_running() for process in started), 60)
    return words, code, second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "where"),
    [(signal.SIGKILL, OWN_RAY), (signal.SIGINT, {}), (signal.SIGKILL, {}), (signal.SIGKILL, OWN_RAY | WARM)],
    ids=["killed with its Ray", "interrupted on a cluster", "killed on a cluster", "killed with its Ray and warm host"],
)
def test_the_same_command_goes_on_and_repeats_nothing(
    world: World, sent: signal.Signals, where: dict[str, Any]
) -> None:
    words, code, second = killed_in_second_trial(world, sent, **where)
    assert code == (-9 if sent is signal.SIGKILL else 130)
    before = kept(world)
    assert [trial["state"] for trial in before] == ["finished", "running" if sent is signal.SIGKILL else "waiting"]

    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    after = kept(world)
    assert [trial["name"] for trial in after] == [trial["name"] for trial in before]
    assert [trial["state"] for trial in after] == ["finished", "finished"]
    assert len(attempts(world, after[0]["name"])) == 1
    first, last = attempts(world, second)
    assert first["reason"] in (KILLED if sent is signal.SIGKILL else ("stopped",))
    assert last["start_step"] >= 20
    assert last["executed_steps"] == 400 - last["start_step"]


class DriverKiller:
    """Kills the process of a trial's driver once, when its run has a checkpoint behind it."""

    def __init__(self) -> None:
        self.killed = 0

    def __call__(self, book: Book) -> None:
        if not self.killed and any(trial.reports for trial in book.trials):
            self.killed = kill_trials()


@pytest.mark.slow
def test_workers_of_a_trial_whose_driver_was_killed_are_freed_and_the_trial_goes_on(world: World) -> None:
    """On one CPU: the second attempt can only start if the first one's placement group is gone (ray #54305)."""
    killer = DriverKiller()
    own = {"ray_address": None, "ray_init_kwargs": {"num_cpus": 1}, "ray_num_workers": 1}
    steps = {"max_steps": 1500, "save_steps": 50, "eval_steps": 300}
    outcome, _ = run(world, [{**LORA, "lora_rank": {"choice": [4]}}], killer, **own, **steps)
    assert killer.killed == 1
    (trial,) = outcome.book.trials
    assert trial.state == "finished"
    first, last = attempts(world, trial.name)
    assert first["reason"] in KILLED
    assert last["start_step"] >= 300
    assert last["executed_steps"] == 1500 - last["start_step"]


@pytest.mark.slow
def test_a_finished_search_goes_on_if_more_trials_are_asked_for(world: World) -> None:
    run(world, [LORA], tune={"search": "random", "num_samples": 1})
    outcome, _ = run(world, [LORA], tune={"search": "random", "num_samples": 2})
    assert [trial.state for trial in outcome.book.trials] == ["finished", "finished"]
    assert len(attempts(world, outcome.book.trials[0].name)) == 1


def test_another_search_of_the_same_name_is_refused_by_what_differs(world: World) -> None:
    book = Book(_place(world))
    book.searched = {"learning_rate": 1.0}
    book.save()
    with pytest.raises(Refused, match=r"The search search was begun with other values \(.*learning_rate"):
        run(world, [LORA])


def _place(world: World) -> Any:
    from tunefleet.storage import place

    return place(folder(world))
