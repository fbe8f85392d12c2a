"""The JSON Schema: editors complete and check a recipe with it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import jsonschema
import pytest

from tunefleet.recipe.owners import known_keys
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.schema import recipe_schema

BASE: dict[str, object] = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "outputs/first"}


def accepts(keys: Mapping[str, object]) -> bool:
    return jsonschema.Draft202012Validator(recipe_schema()).is_valid(keys)


def test_it_is_a_schema_of_the_draft_it_names_and_json() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_every_key_of_every_method_is_described() -> None:
    properties = recipe_schema()["properties"]
    assert isinstance(properties, dict)
    assert properties.keys() >= known_keys()
    assert all(isinstance(entry, dict) and entry["description"] for entry in properties.values())


@pytest.mark.parametrize("name", ["full", "freeze", "lora"])
def test_what_a_recipe_writes_out_fits(name: str) -> None:
    assert accepts(read_flat(BASE | {"finetuning_type": name}).flat())


@pytest.mark.parametrize(
    "keys",
    [
        *({"seed": None}, {"lora_target": "q_proj,v_proj"}, {"lora_target": ["q_proj"]}, {"ray_num_workers": [1, 2]}),
        *({"preprocessing_batch_size": 3}, {"use_galore": False}, {"resume_from_checkpoint": "c/step_00000010"}),
    ],
)
def test_what_people_write_fits(keys: dict[str, object]) -> None:
    assert accepts(BASE | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_rnk": 1},
        {"seed": "x"},
        {"optim": "adam"},
        {"lora_rank": 0},
        {"use_badam": "layer"},
        {"finetuning_type": "x"},
        {"quantization_bit": 4},
        {"learning_rate": 0},
        {"dataset": 3},
    ],
)
def test_what_is_wrong_does_not_fit(keys: dict[str, object]) -> None:
    assert not accepts(BASE | keys)


def test_required_keys_are_required() -> None:
    assert not accepts({})
    assert recipe_schema()["required"] == ["model_name_or_path", "dataset", "output_dir"]
