"""The key `ray_node_types`: what is taken, what is refused, and what the pages show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunefleet.errors import Refused
from tunefleet.recipe.read import read_flat

BASE: dict[str, Any] = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "finetuning_type": "lora"}
ROOT = Path(__file__).resolve().parents[2]
CPU = {"resources": {"CPU": 1}, "max_workers": 2}


def test_types_are_read_as_written_and_again_from_the_record() -> None:
    recipe = read_flat({**BASE, "ray_node_types": {"cpu": {**CPU, "labels": {"pool": "spot"}}}})
    assert recipe.ray.ray_node_types is not None
    one = recipe.ray.ray_node_types["cpu"]
    assert (one.resources, one.max_workers, one.labels) == ({"CPU": 1.0}, 2, {"pool": "spot"})
    assert read_flat(recipe.flat()) == recipe


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({}, "is no mapping of node types; write {gpu:"),
        ({"cpu": {"resources": {"CPU": 1}}}, "cpu is no node type"),
        ({"cpu": {**CPU, "max_workers": 0}}, "cpu is no node type"),
        ({"cpu": {**CPU, "max_workers": True}}, "cpu is no node type"),
        ({"cpu": {**CPU, "resources": {}}}, "cpu is no node type"),
        ({"cpu": {**CPU, "resources": {"CPU": -1}}}, "cpu is no node type"),
        ({"cpu": {**CPU, "min_workers": 1}}, "cpu is no node type"),
    ],
)
def test_what_is_no_node_type_is_refused_by_its_name(written: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        read_flat({**BASE, "ray_node_types": written})


@pytest.mark.parametrize("page", ["README.md", "docs/autoscaled-search.md"])
def test_what_the_pages_show_is_taken(page: str) -> None:
    blocks = re.findall(r"```yaml\n(ray_node_types:.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert read_flat({**BASE, **yaml.safe_load(block)}).ray.ray_node_types
