"""Keys of the peers: refused or accepted with a notice, never dropped in silence."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import Seq2SeqTrainingArguments

from tunefleet.recipe.owners import known_keys
from tunefleet.recipe.peers import IGNORED, REFUSED, judge
from tunefleet.recipe.problems import Problem, RecipeError
from tunefleet.recipe.read import read_flat

BASE: dict[str, object] = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "outputs/first"}


def test_no_key_stands_in_two_tables() -> None:
    assert not IGNORED.keys() & REFUSED.keys()
    assert not (IGNORED.keys() | REFUSED.keys()) & known_keys()


def test_every_argument_of_transformers_trainer_is_known() -> None:
    names = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert names - known_keys() - IGNORED.keys() - REFUSED.keys() == set()


@pytest.mark.parametrize("key", sorted(IGNORED))
def test_a_key_without_meaning_is_accepted_with_a_notice(key: str) -> None:
    recipe = read_flat(BASE | {key: 1})
    assert len(recipe.notices) == 1
    assert recipe.notices[0].startswith(f"{key}: accepted and not used")
    assert key not in recipe.written
    assert key not in recipe.flat()


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_key_that_would_change_the_result_is_refused_with_its_mend(key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_flat(BASE | {key: "s3cret"})
    (problem,) = caught.value.problems
    assert problem.key == key
    assert problem.mend
    assert "s3cret" not in problem.line()


@pytest.mark.parametrize(
    ("key", "value"), [("streaming", False), ("mix_strategy", "concat"), ("model_revision", "main")]
)
def test_a_peers_key_that_asks_for_nothing_is_accepted_with_a_notice(key: str, value: object) -> None:
    assert read_flat(BASE | {key: value}).notices == (f"{key}: {_text(value)} asks for nothing and is not used here",)


def _text(value: object) -> str:
    return "false" if value is False else repr(value)


def test_zero_is_not_taken_for_false() -> None:
    assert isinstance(judge("streaming", 0), Problem)


def test_the_mends_of_llama_pro_and_of_quantised_models() -> None:
    with pytest.raises(RecipeError, match=r"use_llama_pro: .*; .*freeze_trainable_layer_ids"):
        read_flat(BASE | {"use_llama_pro": True, "finetuning_type": "freeze"})
    with pytest.raises(RecipeError, match=r"quantization_bit: .*; remove quantization_bit"):
        read_flat(BASE | {"quantization_bit": 4})


def test_a_null_peer_key_says_nothing() -> None:
    assert read_flat(BASE | {"quantization_bit": None, "rope_scaling": None}).notices == ()
