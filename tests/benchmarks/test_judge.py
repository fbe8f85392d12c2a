"""Distances of results are relative to the way that training went."""

from pathlib import Path

import pytest
import torch
from beside.judge import distance, load_weights, movement_ratio
from safetensors.torch import save_file

START = {"w": torch.zeros(3, dtype=torch.float64)}
RESULT = {"w": torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)}


def test_the_same_result_is_at_distance_zero() -> None:
    assert movement_ratio(RESULT, RESULT, START) == 0.0


def test_a_result_that_stayed_at_the_start_is_at_distance_one() -> None:
    assert distance(START, RESULT) == 5.0
    assert movement_ratio(START, RESULT, START) == 1.0


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="one of the two only"):
        distance(START, {"v": torch.zeros(3)})


def test_an_adapter_is_read_before_a_model(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert load_weights(tmp_path)["w"].dtype == torch.float64
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert set(load_weights(tmp_path)) == {"a"}
