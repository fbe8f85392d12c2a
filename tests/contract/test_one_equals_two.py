"""One worker equals two for the same global batches (exact sums, not means of means), for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.contract.pair import (
    ONE_ROW,
    PROJECTIONS,
    REFUSAL,
    bases_of_different_gradients,
    refusal_of_ratio_mode,
    train_cell,
)
from tests.contract.variants import SHARED
from tests.group import run_group

FP32_BYTES = 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What both ranks of one group saw, all cells."""
    folder = tmp_path_factory.mktemp("pair")
    arguments = [[str(rank), str(folder / "meet"), str(folder / f"{rank}.pt")] for rank in (0, 1)]
    run_group([["tests.contract.pair", *own] for own in arguments], seconds=200)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("variant", "architecture"), [*SHARED, *((variant, "llama") for variant in PROJECTIONS)])
def test_one_worker_equals_two(pair: list[dict[Any, Any]], variant: str, architecture: str) -> None:
    one = train_cell(variant, architecture)
    first, second = (rank[variant, architecture] for rank in pair)
    assert first["losses"] == second["losses"]  # both ranks know the same sum
    assert torch.tensor(first["losses"]) == pytest.approx(torch.tensor(one["losses"]), abs=1e-5)
    assert max(one["norms"]) > 0.5, "clipping was never needed, so it was not tested"
    assert first["hashes"] == second["hashes"]  # after every update, so after every switch of what trains too
    assert len(set(first["hashes"])) == len(first["losses"])
    assert torch.equal(first["moved"], second["moved"])
    distance = float((first["moved"] - one["moved"]).norm() / one["moved"].norm())
    assert 0.0 < distance <= 1e-4
    assert first["tokens"] + second["tokens"] == one["tokens"]
    assert first["tokens"] / one["tokens"] == pytest.approx(0.5, abs=0.15)
    assert first["bytes"] > 0
    assert one["bytes"] == 0


@pytest.mark.parametrize(("variant", "architecture"), [cell for cell in SHARED if not cell[0].startswith("galore")])
def test_only_what_trains_is_sent(pair: list[dict[Any, Any]], variant: str, architecture: str) -> None:
    """Its fp32 gradient once for each update, with the loss and the wish to stop behind it: to the byte."""
    for rank in pair:
        seen = rank[variant, architecture]
        assert seen["sent"] == [FP32_BYTES * (entries + 2) for entries in seen["trainable"]]
        if variant != "full":
            assert max(seen["trainable"]) < 0.9 * seen["entries"]
        if variant == "badam_layer":
            assert len(set(seen["sent"])) > 1, "blocks are of several sizes"


def test_a_rank_without_samples_contributes_zeros(pair: list[dict[Any, Any]]) -> None:
    one = train_cell("full", "gpt2", global_batch=1)
    first, second = (rank["full", ONE_ROW] for rank in pair)
    assert second["tokens"] == 0
    assert first["tokens"] == one["tokens"]
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert torch.equal(first["moved"], second["moved"])
    assert float((first["moved"] - one["moved"]).norm()) <= 1e-4 * float(one["moved"].norm())


def test_ratio_mode_refuses_two_workers_but_not_a_group_of_one(pair: list[dict[Any, Any]], tmp_path: Path) -> None:
    for rank in pair:
        told = rank["badam_ratio", REFUSAL]
        assert told == (
            "badam_mode: ratio trains on one worker, but there are 2; write ray_num_workers: 1, or badam_mode: layer"
        )
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    try:
        assert refusal_of_ratio_mode() == ""
    finally:
        dist.destroy_process_group()


def test_bases_come_from_the_first_rank(pair: list[dict[Any, Any]]) -> None:
    """Each rank was given other gradients: what is broadcast is all that can make their bases equal."""
    first, second = (rank["bases"] for rank in pair)
    alone = bases_of_different_gradients(0)
    other = bases_of_different_gradients(1)
    assert len(first) == 6
    assert [rank["decompositions"] for rank in pair] == [2 * 3, 0]  # two refreshes of three tensors, on rank 0 alone
    for name, basis in first.items():
        assert torch.equal(basis, second[name]), name
        assert basis.stride() == second[name].stride()
        assert torch.equal(basis, alone[name])
        assert not torch.equal(basis, other[name])
