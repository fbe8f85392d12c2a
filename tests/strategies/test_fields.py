"""Lists as people write them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.lora import Lora


@pytest.mark.parametrize("written", ["q_proj, v_proj", ["q_proj", "v_proj"], ("q_proj", " v_proj ")])
def test_names_as_a_comma_string_or_a_list(written: object) -> None:
    assert Lora.model_validate({"lora_target": written}).lora_target == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("mlp,", "empty piece"),
        ("", "empty piece"),
        ([], "empty piece"),
        ("all,q_proj", "`all` stands for every name"),
        ("q_proj,q_proj", "stands twice"),
        (3, "is not a name"),
    ],
)
def test_names_that_mean_nothing_are_refused(written: object, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Lora.model_validate({"lora_target": written})


@pytest.mark.parametrize("written", [[3, 7], "3, 7", (3, 7)])
def test_numbers_as_a_comma_string_or_a_list(written: object) -> None:
    assert Freeze.model_validate({"freeze_trainable_layer_ids": written}).freeze_trainable_layer_ids == (3, 7)


def test_one_number_is_a_list_of_one() -> None:
    assert Freeze.model_validate({"freeze_trainable_layer_ids": 3}).freeze_trainable_layer_ids == (3,)


def test_settings_survive_json() -> None:
    for method in (
        Lora(lora_target=("q_proj",), use_dora=True),
        Freeze.model_validate({"freeze_trainable_layer_ids": [1]}),
    ):
        assert type(method).model_validate(method.model_dump(mode="json")) == method


def test_schema_offers_both_ways_to_write_names() -> None:
    schema = Lora.model_json_schema()["properties"]["lora_target"]
    assert {kind["type"] for kind in schema["anyOf"]} == {"string", "array"}
