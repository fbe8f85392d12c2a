"""Fingerprints tell apart what differs in a single bit, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tunefleet.artifacts.fingerprints import fingerprint, folder_fingerprint


def test_equal_states_are_equal() -> None:
    a = {"x": torch.arange(6.0).reshape(2, 3), "y": [1, None, (2.5, "z")], 3: np.arange(2), "e": torch.empty(0)}
    b = {3: np.arange(2), "e": torch.empty(0), "y": [1, None, (2.5, "z")], "x": torch.arange(6.0).reshape(2, 3)}
    assert fingerprint(a) == fingerprint(b)
    grid = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(grid.t().contiguous().t()) == fingerprint(grid)


def test_one_bit_is_another_fingerprint() -> None:
    weights = torch.ones(5, dtype=torch.bfloat16)
    changed = weights.clone()
    changed.view(torch.int16)[3] += 1
    assert fingerprint(weights) != fingerprint(changed)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (["a", "b"], ["ab"]),
        ([[1], 2], [[1, 2]]),
        (1, True),
        (1, "1"),
        ({"a": 1}, {"a": 2}),
        (0.1, 0.1 + 2**-55),
    ],
)
def test_what_differs_differs(one: object, other: object) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_a_foreign_object_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no fingerprint"):
        fingerprint({"a": object()})


def test_a_folders_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"1")
    first = folder_fingerprint(tmp_path)
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    second = folder_fingerprint(tmp_path)
    (tmp_path / "b.bin").write_bytes(b"2")
    assert len({first, second, folder_fingerprint(tmp_path)}) == 3
    assert folder_fingerprint(tmp_path, "*.txt") != folder_fingerprint(tmp_path)
