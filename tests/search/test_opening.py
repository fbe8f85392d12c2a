"""The whole space is checked before a first trial: one sentence for each thing that is wrong."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from tests.search.illegal import BASE, NAMES, RULES, legal_space

from tunefleet.recipe.problems import RecipeError
from tunefleet.recipe.tune import search_from
from tunefleet.search.opening import open_space
from tunefleet.search.space import Space


def opened(space: Any, tune: Mapping[str, object] | None = None, **base: object) -> Space:
    return open_space(search_from({**BASE, **base, "tune": {**(tune or {}), "space": space}}))


def refusals(space: Any, tune: Mapping[str, object] | None = None, **base: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        opened(space, tune, **base)
    return [problem.line() for problem in caught.value.problems]


@pytest.mark.parametrize("seed", range(100))
def test_a_random_illegal_space_is_refused_with_one_sentence(seed: int) -> None:
    chance = random.Random(seed)
    rule = sorted(RULES)[seed % len(RULES)]
    space, tune = RULES[rule](chance)
    (line,) = refusals(space, tune)
    assert line.startswith("tune.")
    assert "\n" not in line
    assert "; " in line, "no mend"
    assert NAMES.get(rule, "") in line


@pytest.mark.parametrize("seed", range(50))
def test_a_random_legal_space_is_opened_and_its_points_have_recipes(seed: int) -> None:
    chance = random.Random(seed)
    space = opened(legal_space(chance))
    for _ in range(20):
        index, values = space.draw(chance)
        point = space.point(index, values)
        recipe = space.branches[index].recipe(point.values)
        assert recipe.method.name == space.branches[index].method.name
        assert all(recipe.flat()[key] == value for key, value in point.values.items())
        assert not set(point.values) & set(recipe.method.unused())


def test_everything_wrong_is_told_at_once() -> None:
    lines = refusals([{"lora_rank": {"choice": [-1]}, "zzz": 1}, {"finetuning_type": "qlora"}], {"metric": "x"})
    assert len(lines) == 4


def test_what_is_wrong_above_the_block_is_told_as_in_train() -> None:
    space = [{"finetuning_type": "lora", "lora_rank": {"choice": [4]}}, {"finetuning_type": "full"}]
    assert refusals(space, dataset=None) == ["dataset: is missing; write dataset: and its value"]
    assert refusals(space, loraa=1) == ["loraa: is no key of a recipe; did you mean lora_rank (a key of lora)?"]


def test_a_key_above_the_block_is_the_default_of_branches_that_know_it() -> None:
    space = opened([{"finetuning_type": "lora"}, {"finetuning_type": "full"}], lora_rank=16, learning_rate=3e-4)
    lora, full = space.branches
    assert lora.recipe({}).flat()["lora_rank"] == 16
    assert full.recipe({}).training.learning_rate == 3e-4
    (line,) = refusals([{"finetuning_type": "full"}], lora_rank=16)
    assert line.startswith("lora_rank: belongs to lora, and no branch of tune.space selects that")


def test_a_branch_that_chooses_its_method_is_not_bound_by_the_choice_above() -> None:
    (branch,) = opened([{"finetuning_type": "lora"}], finetuning_type="full", use_galore=True).branches
    assert branch.recipe({}).method.name == "lora"


def test_a_mapping_is_one_branch_of_the_recipes_own_method() -> None:
    (branch,) = opened({"galore_rank": {"choice": [32, 64]}}, finetuning_type="full", use_galore=True).branches
    assert (branch.name, list(branch.domains)) == ("galore", ["galore_rank"])


def test_auto_takes_the_selected_methods_own_space() -> None:
    space = opened("auto", finetuning_type="full", use_badam=True, badam_mode="ratio", learning_rate=1e-5)
    (branch,) = space.branches
    assert list(branch.domains) == [
        "badam_switch_interval",
        "badam_update_ratio",
        "badam_mask_mode",
        "learning_rate",
    ]
    assert space.notices == ("learning_rate: not used for badam, because space: auto searches it",)


def test_auto_without_a_selected_method_takes_every_methods_own() -> None:
    assert [branch.name for branch in opened("auto").branches] == ["full", "freeze", "lora", "galore", "badam"]


def test_auto_refuses_ranks_of_rslora_without_alpha() -> None:
    (line,) = refusals("auto", finetuning_type="lora", use_rslora=True)
    assert "use_rslora with lora_alpha unset" in line
    assert opened("auto", finetuning_type="lora", use_rslora=True, lora_alpha=16)


def test_branches_of_one_method_are_told_apart_by_what_is_fixed() -> None:
    forms = [{"finetuning_type": "lora"}, {"finetuning_type": "lora", "use_dora": True}]
    assert [branch.name for branch in opened(forms).branches] == ["lora (branch 0)", "lora (use_dora: true)"]


@pytest.mark.parametrize(
    ("tune", "base", "sentence"),
    [
        ({}, {"eval_strategy": "no"}, "tune.metric: eval_loss is what the search looks for, and nothing evaluates"),
        ({"scheduler": "asha"}, {"eval_strategy": "no", "do_eval": True}, "tune.scheduler: asha stops trials between"),
    ],
)
def test_a_metric_needs_evaluations(tune: dict[str, object], base: dict[str, object], sentence: str) -> None:
    (line,) = refusals([{"finetuning_type": "lora"}], tune, **base)
    assert line.startswith(sentence)


def test_a_grid_of_too_many_points_is_refused() -> None:
    space = [
        {"finetuning_type": "full", "warmup_steps": {"randint": [0, 90_000]}, "weight_decay": {"choice": [0, 0.1]}}
    ]
    (line,) = refusals(space, {"search": "grid"})
    assert "too many for a grid" in line


def test_the_trials_of_a_tournament_are_shared_evenly() -> None:
    forms = [{"finetuning_type": "lora"}, {"finetuning_type": "full"}, {"finetuning_type": "freeze"}]
    (line,) = refusals(forms, {"tournament": True, "num_samples": 10})
    assert line == "tune.num_samples: 10 cannot be shared evenly by the 3 branches of a tournament; write 12"
    assert opened(forms, {"tournament": True, "num_samples": 12})


def test_each_branch_of_pbt_has_a_population() -> None:
    forms = [{"finetuning_type": name, "learning_rate": {"uniform": [1e-5, 1e-3]}} for name in ("lora", "full")]
    few = "2 is too few for a population, which has at least 2 of each branch; write 4"
    odd = "5 cannot be shared evenly by the 2 branches of a population; write 6"
    for samples, words in ((2, few), (5, odd)):
        assert refusals(forms, {"scheduler": "pbt", "num_samples": samples}) == [f"tune.num_samples: {words}"]
    assert opened(forms, {"scheduler": "pbt", "num_samples": 4})


def test_a_population_hands_on_its_newest_checkpoints() -> None:
    form = {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}
    (line,) = refusals([form], {"scheduler": "pbt"}, load_best_model_at_end=True, save_steps=10)
    assert line.startswith("load_best_model_at_end: takes an earlier checkpoint at the end")
