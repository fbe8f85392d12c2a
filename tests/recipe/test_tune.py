"""The `tune:` block: what is read, and every refusal of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunefleet.recipe.problems import RecipeError
from tunefleet.recipe.read import read_recipe
from tunefleet.recipe.tune import TuneSettings, read_search, search_from

SPACE = [{"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}]


def refusals(**block: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        search_from({"tune": {"space": SPACE, **block}})
    return [problem.line() for problem in caught.value.problems]


def read(**block: object) -> TuneSettings:
    return search_from({"tune": {"space": SPACE, **block}}).tune


def test_defaults_of_a_search() -> None:
    tune = read()
    assert (tune.metrics, tune.modes) == (("eval_loss",), ("min",))
    assert (tune.search, tune.scheduler, tune.max_concurrent_trials, tune.seconds) == ("optuna", "none", "auto", None)


def test_several_metrics_share_one_direction_or_have_their_own() -> None:
    assert read(metric=["eval_loss", "seconds"]).modes == ("min", "min")
    assert read(metric=["eval_loss", "tokens_per_second"], mode=["min", "max"]).modes == ("min", "max")


def test_a_budget_is_in_hours() -> None:
    assert read(budget={"hours": 0.5}).seconds == 1800


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"memory_limit": "24GB"}, "tune.memory_limit: there is no estimate of a trial's memory yet; remove it"),
        ({"tournament": True, "search": "grid"}, "tune.tournament: gives each method as many trials, and a grid"),
        ({"tournament": True, "metric": ["loss", "mfu"]}, "tune.tournament: compares methods by one metric"),
        ({"tournament": True, "scheduler": "hyperband"}, "tune.tournament: judges trials within their method"),
        ({"finalist_seeds": 2}, "tune.finalist_seeds: is for tournament: true; write that, or remove it"),
        ({"perturbation_interval": 2}, "tune.perturbation_interval: is for pbt, and tune.scheduler is none; remove it"),
        ({"quantile_fraction": 0.6, "scheduler": "pbt"}, "tune.quantile_fraction: 0.6 must be at most 0.5"),
        ({"scheduler": "pbt", "metric": ["loss", "mfu"]}, "tune.scheduler: pbt compares trials by one metric"),
        (
            {"scheduler": "pbt", "tournament": True},
            "tune.tournament: repeats a recipe under other seeds, and under pbt",
        ),
        ({"scheduler": "pbt", "trial_host": "warm"}, "tune.trial_host: keeps a host for whole trials, and under pbt"),
        ({"trial_host": "hot"}, "tune.trial_host: 'hot' is not cold or warm"),
        ({"num_sample": 3}, "tune.num_sample: is no key of a search; did you mean tune.num_samples?"),
        ({"search": "optina"}, "tune.search: 'optina' is not grid, random, optuna, hyperopt or bohb"),
        ({"num_samples": 0}, "tune.num_samples: 0 must be at least 1"),
        ({"max_concurrent_trials": 0}, "tune.max_concurrent_trials: 0 is neither auto nor a number of trials"),
        ({"budget": {"hours": float("inf")}}, "tune.budget: takes a number of hours above 0; write {hours: 2}"),
        ({"budget": {"minutes": 3}}, "tune.budget: {'minutes': 3} is no number of hours; write {hours: 2}"),
        ({"metric": ["loss", "loss"]}, "tune.metric: names a metric twice"),
        ({"metric": ["loss"], "mode": ["min", "max"]}, "tune.mode: has 2 directions for 1 metrics"),
        ({"metric": ["loss", "mfu"], "search": "hyperopt"}, "tune.search: hyperopt follows one metric"),
        ({"metric": ["loss", "mfu"], "scheduler": "asha"}, "tune.scheduler: asha compares trials by one metric"),
        ({"search": "bohb"}, "tune.search: bohb learns at the rungs of hyperband, and tune.scheduler is none"),
        ({"search": "grid", "num_samples": 3}, "tune.num_samples: a grid runs all of its points"),
        ({"grace_steps": 3}, "tune.grace_steps: is for asha and median"),
        ({"space": None}, "tune.space: is missing"),
    ],
)
def test_what_is_wrong_with_a_block_is_one_sentence(block: dict[str, object], sentence: str) -> None:
    (line,) = refusals(**block)
    assert line.startswith(sentence)


def test_everything_wrong_is_told_at_once() -> None:
    assert len(refusals(num_samples=0, scheduler="pbd", memory_limit="1GB")) == 3


@pytest.mark.parametrize("block", [None, 3, []])
def test_a_recipe_without_a_block_is_no_search(block: object) -> None:
    with pytest.raises(RecipeError, match="tune: "):
        search_from({"model_name_or_path": "m", "tune": block})


def test_overrides_reach_into_the_block_and_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("output_dir: out\nmax_steps: 10\ntune:\n  num_samples: 3\n  space: auto\n")
    search = read_search(file, ["tune.num_samples=8", "max_steps=20", "tune.search=random"])
    assert (search.tune.num_samples, search.tune.search) == (8, "random")
    assert search.keys == {"output_dir": "out", "max_steps": 20}


def test_train_says_which_command_runs_a_search(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("model_name_or_path: m\ndataset: d\noutput_dir: out\ntune: {space: auto}\n")
    with pytest.raises(RecipeError, match="tune: asks for a search; give the recipe to `tunefleet tune`"):
        read_recipe(file)
