"""State under another rank, interval or decay: what must be equal is, and what must be lost is as little as can be."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.strategies.optim.badam_models import backward, batches, layer_blocks, llama, one_group, spec
from torch import Tensor

from tunefleet_strategies.optim.block_adamw import BlockAdamW
from tunefleet_strategies.optim.block_schedule import NEVER, BlockSchedule
from tunefleet_strategies.optim.carrying import Factors, decayed, resized_factors, resized_subspace, resized_visit
from tunefleet_strategies.optim.projection import Basis, find_basis
from tunefleet_strategies.optim.ratio_adamw import RatioAdamW

ROWS, COLUMNS, RANK = 12, 10, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(a: Tensor, b: Tensor, scale: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd says for A and B where the layer computes with s B A and the loss has this gradient there."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    (scale * (b @ a)).backward(upstream)
    assert a.grad is not None
    assert b.grad is not None
    return a.grad, b.grad


def factors(scale: float, a: Tensor | None = None, b: Tensor | None = None) -> Factors:
    """Factors whose moments are those after a first update of which the gradient is known."""
    a = random(RANK, COLUMNS, seed=1) if a is None else a
    b = random(ROWS, RANK, seed=2) if b is None else b
    grad_a, grad_b = gradients(a, b, scale, UPSTREAM)
    states = [{"step": torch.tensor(5.0), "exp_avg": g, "exp_avg_sq": g.square()} for g in (grad_a, grad_b)]
    return Factors(a, b, states[0], states[1])


UPSTREAM = random(ROWS, COLUMNS, seed=3)
FRESH = random(9, COLUMNS, seed=4)


@pytest.mark.parametrize(("before", "now"), [(2.0, 2.0), (2.0, 1.0), (4.0, 4 / math.sqrt(2))])
def test_grown_factors_are_the_same_function_with_the_moments_that_they_would_have_had(
    before: float, now: float
) -> None:
    old = factors(before)
    new = resized_factors(old, 7, before / now, FRESH)
    assert (new.a.shape, new.b.shape) == ((7, COLUMNS), (ROWS, 7))
    torch.testing.assert_close(now * new.b @ new.a, before * old.b @ old.a, rtol=1e-6, atol=1e-6)
    grad_a, grad_b = gradients(new.a, new.b, now, UPSTREAM)
    torch.testing.assert_close(new.a_state["exp_avg"][:RANK], grad_a[:RANK], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new.b_state["exp_avg"][:, :RANK], grad_b[:, :RANK], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new.b_state["exp_avg_sq"][:, :RANK], grad_b[:, :RANK].square(), rtol=1e-5, atol=1e-6)
    assert not new.a_state["exp_avg"][RANK:].any()
    assert not new.b_state["exp_avg_sq"][:, RANK:].any()
    assert new.a_state["step"] == 5
    # What is new can learn: one of the two is not zero.
    assert new.a[RANK:].abs().min() > 0
    assert not new.b[:, RANK:].any()


def test_a_rank_that_grows_at_the_same_scale_keeps_every_bit() -> None:
    old = factors(2.0)
    new = resized_factors(old, 7, 1.0, FRESH)
    assert torch.equal(new.a[:RANK], old.a)
    assert torch.equal(new.b[:, :RANK], old.b)
    assert torch.equal(new.b_state["exp_avg_sq"][:, :RANK], old.b_state["exp_avg_sq"])


@pytest.mark.parametrize("now", [2.0, 1.0])
def test_cut_factors_are_the_best_of_their_rank(now: float) -> None:
    old = factors(2.0)
    new = resized_factors(old, 2, 2.0 / now, FRESH)
    u, s, vh = torch.linalg.svd(old.b @ old.a)
    best = 2.0 * (u[:, :2] * s[:2]) @ vh[:2]
    torch.testing.assert_close(now * new.b @ new.a, best, rtol=1e-5, atol=1e-5)
    # Rows of A stay as long as they were, so that B learns as fast as before.
    lengths = torch.linalg.vector_norm(new.a, dim=1)
    torch.testing.assert_close(lengths, torch.full((2,), float(torch.linalg.vector_norm(old.a)) / 2))
    # First moments go over exactly: they are those of the gradient that the cut factors have.
    grad_a, grad_b = gradients(new.a, new.b, now, UPSTREAM)
    torch.testing.assert_close(new.a_state["exp_avg"], grad_a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new.b_state["exp_avg"], grad_b, rtol=1e-4, atol=1e-4)
    assert (new.a_state["exp_avg_sq"] >= 0).all()
    assert new.a.is_contiguous()


def test_a_cut_that_takes_away_nothing_changes_nothing() -> None:
    """Two of the four directions are not used, so two are enough."""
    b = random(ROWS, RANK, seed=2)
    b[:, 2:] = 0
    old = factors(2.0, b=b)
    new = resized_factors(old, 2, 1.0, FRESH)
    torch.testing.assert_close(new.b @ new.a, old.b @ old.a, rtol=1e-5, atol=1e-5)


def test_a_cut_of_what_has_learnt_nothing_can_still_learn() -> None:
    """B is zero at the beginning, and with it the product: A starts anew, or neither would ever get a gradient."""
    new = resized_factors(factors(2.0, b=torch.zeros(ROWS, RANK)), 2, 1.0, FRESH)
    assert new.a.shape == (2, COLUMNS)
    assert new.a.abs().min() > 0
    assert not new.b.any()


def test_factors_of_an_embedding_draw_what_is_new_in_b() -> None:
    new = resized_factors(factors(2.0), 6, 1.0, random(ROWS, 6), fresh_in_b=True)
    assert not new.a[RANK:].any()
    assert new.b[:, RANK:].abs().min() > 0


def test_factors_without_moments_have_none_afterwards() -> None:
    old = factors(2.0)
    for rank in (2, 7):
        new = resized_factors(Factors(old.a, old.b, {}, {}), rank, 2.0, FRESH)
        assert (new.a_state, new.b_state) == ({}, {})


# ---- GaLore ---------------------------------------------------------------------------------------------------------


def projected(
    side: str, rank: int, shape: tuple[int, ...] = (ROWS, COLUMNS), dtype: Any = torch.float32
) -> dict[str, Any]:
    gradient = random(*shape, seed=5)
    basis = find_basis(gradient, side, rank, "svd", None)[0]  # type: ignore[arg-type]
    low = basis.project(gradient)
    return {"step": 3, "exp_avg": low, "exp_avg_sq": low.square(), **basis.stored_as(dtype).tensors()}


def basis_of(state: dict[str, Any]) -> Basis:
    return Basis(state.get("left"), state.get("right"))


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (3, ROWS, COLUMNS)], ids=["matrix", "experts"])
def test_an_extended_subspace_holds_the_same_update(side: str, shape: tuple[int, ...]) -> None:
    old = projected(side, RANK, shape)
    new = resized_subspace(old, 7, torch.Generator().manual_seed(0))
    for name, kept in basis_of(old).tensors().items():
        there = new[name][..., :RANK] if name == "left" else new[name][..., :RANK, :]
        assert torch.equal(there, kept)
        vectors = new[name] if name == "left" else new[name].mT
        unit = torch.eye(7).expand(*shape[:-2], 7, 7)
        torch.testing.assert_close(vectors.mT @ vectors, unit, rtol=0, atol=1e-5)
        assert new[name].mT.is_contiguous()
    torch.testing.assert_close(basis_of(new).back(new["exp_avg"]), basis_of(old).back(old["exp_avg"]))
    assert new["exp_avg"].square().sum() == old["exp_avg"].square().sum()
    assert new["step"] == 3


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_cut_subspace_is_that_of_the_leading_vectors(side: str) -> None:
    """Singular vectors stand by size, so what is left is what would have been found at that rank."""
    new = resized_subspace(projected(side, RANK), 2, torch.Generator())
    for name, tensor in projected(side, 2).items():
        if isinstance(tensor, Tensor):
            torch.testing.assert_close(new[name], tensor)
            assert new[name].stride() == tensor.stride()
            assert new[name].untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def test_a_rank_beyond_the_smaller_side_is_cut_to_it() -> None:
    new = resized_subspace(projected("right", RANK), 64, torch.Generator().manual_seed(0))
    assert new["right"].shape == (COLUMNS, COLUMNS)
    assert new["exp_avg"].shape == (ROWS, COLUMNS)


def test_a_basis_keeps_its_number_format() -> None:
    new = resized_subspace(projected("left", RANK, dtype=torch.bfloat16), 6, torch.Generator().manual_seed(0))
    assert (new["left"].dtype, new["exp_avg"].dtype) == (torch.bfloat16, torch.float32)


# ---- BAdam ----------------------------------------------------------------------------------------------------------


def walker(interval: int, mode: str = "layer") -> Any:
    model = llama()
    blocks = layer_blocks(model)
    if mode == "layer":
        schedule = BlockSchedule(3, interval, "ascending")
        return model, BlockAdamW(one_group(blocks), blocks, schedule, spec())
    parameters = {name: p for block in blocks for name, p in block.parameters.items()}
    return model, RatioAdamW(one_group(blocks), parameters, spec(), ratio=0.1, interval=interval, mask_mode="adjacent")


def steps(model: Any, optimizer: Any, count: int) -> list[int]:
    """Take updates. Returns the visit of each."""
    visits = []
    for ids in batches(count):
        visits.append(optimizer.visit)
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return visits


@pytest.mark.parametrize("mode", ["layer", "ratio"])
@pytest.mark.parametrize(
    ("before", "updates", "now", "visits"),
    [
        (4, 6, 3, [1, 2, 2, 2, 3]),  # two of the visit are done, one is left
        (4, 7, 2, [2, 2, 3, 3, 4]),  # three are done, which is more than two: the next visit begins
        (2, 4, 3, [2, 2, 2, 3, 3]),  # between two visits
        (2, 5, 5, [2, 2, 2, 2, 3]),  # longer
        (4, 6, NEVER, [1, 1, 1, 1, 1]),
        (NEVER, 6, 4, [1, 1, 1, 1, 2]),
    ],
)
def test_the_visit_under_way_goes_on_until_it_has_had_the_new_number(
    mode: str, before: int, updates: int, now: int, visits: list[int]
) -> None:
    model, optimizer = walker(before, mode)
    steps(model, optimizer, updates)
    saved = resized_visit(copy.deepcopy(optimizer.state_dict()), now)
    again, carried = walker(now, mode)
    again.load_state_dict(model.state_dict())
    carried.load_state_dict(saved)
    assert steps(again, carried, 5) == visits
    # Saved once more on the way, it stands where it stood.
    third_model, third = walker(now, mode)
    third_model.load_state_dict(again.state_dict())
    third.load_state_dict(copy.deepcopy(carried.state_dict()))
    assert third.visit == carried.visit


def test_a_visit_that_goes_on_is_the_one_that_a_longer_interval_would_have_had() -> None:
    """Five updates of one block, whether its interval was five from the start or became so after three."""
    whole_model, whole = walker(5)
    steps(whole_model, whole, 5)

    model, optimizer = walker(4)
    data = list(batches(5))
    for ids in data[:3]:
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    again, carried = walker(5)
    again.load_state_dict(model.state_dict())
    carried.load_state_dict(resized_visit(copy.deepcopy(optimizer.state_dict()), 5))
    for ids in data[3:]:
        backward(again, ids)
        carried.step()
        carried.zero_grad(set_to_none=True)
    for (name, one), other in zip(whole_model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert carried.visit == whole.visit == 1


def test_decay_changes_where_there_is_one() -> None:
    groups = [{"name": "base", "weight_decay": 0.1}, {"name": "base_nodecay", "weight_decay": 0.0}]
    told = decayed({"state": {}, "param_groups": groups}, 0.3)
    assert [group["weight_decay"] for group in told["param_groups"]] == [0.3, 0.0]
    assert groups[0]["weight_decay"] == 0.1
