"""Bases of gradients: which side, how exact, how stored."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from tunefleet_strategies.optim import projection
from tunefleet_strategies.optim.projection import (
    Basis,
    Projection,
    Refresh,
    Side,
    captures_enough,
    eigh_basis,
    empty_basis,
    exact_energy,
    find_basis,
    kept_entries,
    side_of,
    subspace_basis,
    svd_basis,
)

SHAPES = [(24, 12), (12, 24), (16, 16), (3, 24, 12), (3, 12, 24)]
SIDES: tuple[Side, ...] = ("left", "right", "both")
RANK = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def falling(*shape: int, seed: int = 0) -> Tensor:
    """A gradient whose singular values fall by half, as those of real ones fall."""
    left, values, right = torch.linalg.svd(draw(*shape, seed=seed), full_matrices=False)
    return (left * 0.5 ** torch.arange(values.shape[-1])) @ right


def captured(gradient: Tensor, basis: Basis) -> Tensor:
    return basis.project(gradient).square().sum((-2, -1))


def assert_orthonormal(basis: Basis) -> None:
    for side, vectors in basis.tensors().items():
        products = vectors.mT @ vectors if side == "left" else vectors @ vectors.mT
        assert torch.allclose(products, torch.eye(RANK).expand_as(products), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tall", "wide", "square"),
    [
        ("std", "right", "left", "right"),
        ("reverse_std", "left", "right", "left"),
        ("right", "right", "right", "right"),
        ("left", "left", "left", "left"),
        ("full", "both", "both", "both"),
    ],
)
def test_which_side_is_projected(kind: Projection, tall: Side, wide: Side, square: Side) -> None:
    assert (side_of(kind, 6, 4), side_of(kind, 4, 6), side_of(kind, 5, 5)) == (tall, wide, square)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("refresh", get_args(Refresh))
def test_a_basis_is_orthonormal_and_captures_what_the_exact_one_does(
    refresh: Refresh, side: Side, shape: tuple[int, ...]
) -> None:
    before, now = falling(*shape), falling(*shape) + 0.01 * draw(*shape, seed=1)
    first, _ = find_basis(before, side, RANK, refresh, None)
    basis, fell_back = find_basis(now, side, RANK, refresh, first)
    assert not fell_back
    assert_orthonormal(basis)
    best = exact_energy(now, RANK)
    assert torch.allclose(best, captured(now, svd_basis(now, side, RANK)), rtol=1e-5)
    assert bool((captured(now, basis) >= (0.999 if refresh == "subspace" else 1 - 1e-5) * best).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_eigh_finds_the_vectors_of_svd_up_to_their_sign(side: Side, shape: tuple[int, ...]) -> None:
    gradient = falling(*shape)
    by_svd, by_eigh = svd_basis(gradient, side, RANK), eigh_basis(gradient, side, RANK)
    for name, vectors in by_svd.tensors().items():
        assert torch.allclose(vectors.abs(), by_eigh.tensors()[name].abs(), atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_signs_follow_the_basis_before(side: Side) -> None:
    gradient = falling(24, 12)
    previous = svd_basis(gradient, side, RANK)
    turned = Basis(*(None if vectors is None else -vectors for vectors in (previous.left, previous.right)))
    for refresh in ("eigh", "subspace"):
        basis, _ = find_basis(gradient, side, RANK, refresh, turned)
        for name, vectors in turned.tensors().items():
            assert torch.allclose(vectors, basis.tensors()[name], atol=1e-3), (refresh, name)


@pytest.mark.parametrize("side", SIDES)
def test_a_subspace_that_has_turned_away_is_found_exactly_instead(side: Side) -> None:
    """Iteration from vectors that the new gradient does not see captures nothing; the gate notices."""
    before, now = torch.zeros(24, 12), torch.zeros(24, 12)
    before[:8, :6], now[8:, 6:] = falling(8, 6), falling(16, 6)
    previous = svd_basis(before, side, RANK)
    assert not captures_enough(now, subspace_basis(now, side, previous), RANK)
    basis, fell_back = find_basis(now, side, RANK, "subspace", previous)
    assert fell_back
    assert torch.allclose(captured(now, basis), exact_energy(now, RANK), rtol=1e-5)


def test_the_gate_compares_with_the_exact_basis_where_no_basis_captures_much() -> None:
    """Of a flat spectrum even the exact basis captures little: a good one must pass, a bad one must not."""
    gradient = torch.linalg.qr(draw(24, 24)).Q * torch.linspace(1.0, 0.8, 24)
    exact = svd_basis(gradient, "right", RANK)
    assert float(captured(gradient, exact)) < 0.3 * float(gradient.square().sum())
    assert captures_enough(gradient, exact, RANK)
    worst = Basis(None, torch.linalg.svd(gradient).Vh[-RANK:])
    assert not captures_enough(gradient, worst, RANK)


def test_one_expert_in_need_makes_the_whole_tensor_exact() -> None:
    experts = torch.stack([falling(24, 12, seed=seed) for seed in range(3)])
    previous = svd_basis(experts, "right", RANK)
    assert previous.right is not None
    assert captures_enough(experts, previous, RANK)
    spoilt = previous.right.clone()
    spoilt[1] = torch.linalg.svd(experts[1]).Vh[-RANK:]
    assert not captures_enough(experts, Basis(None, spoilt), RANK)


@pytest.mark.parametrize("refresh", get_args(Refresh))
@pytest.mark.parametrize("side", SIDES)
def test_each_expert_has_the_basis_that_it_would_have_alone(side: Side, refresh: Refresh) -> None:
    experts = torch.stack([falling(12, 24, seed=seed) for seed in range(3)])
    before = svd_basis(experts + 0.01 * draw(3, 12, 24), side, RANK)
    together, _ = find_basis(experts, side, RANK, refresh, before)
    for number, gradient in enumerate(experts):
        own = {name: vectors[number] for name, vectors in before.tensors().items()}
        alone, _ = find_basis(gradient, side, RANK, refresh, Basis(own.get("left"), own.get("right")))
        for name, vectors in alone.tensors().items():
            assert torch.allclose(vectors, together.tensors()[name][number], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [RANK, 12])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_a_stored_basis_is_compact_and_column_major(
    side: Side, shape: tuple[int, ...], rank: int, dtype: torch.dtype
) -> None:
    gradient = falling(*shape)
    stored = svd_basis(gradient, side, rank).stored_as(dtype)
    room = empty_basis(side, rank, gradient.to(dtype))
    kind: Projection = "full" if side == "both" else side
    entries = 0
    for name, vectors in stored.tensors().items():
        assert vectors.dtype == dtype
        assert vectors.mT.is_contiguous()
        assert vectors.stride()[-2] == 1
        assert vectors.untyped_storage().nbytes() == vectors.numel() * vectors.itemsize
        other = room.tensors()[name]
        assert (other.shape, other.stride(), other.dtype) == (vectors.shape, vectors.stride(), dtype)
        entries += vectors.numel()
    assert entries == kept_entries(kind, rank, shape).basis
    assert stored.project(gradient.to(dtype)).numel() == kept_entries(kind, rank, shape).moment


def test_back_undoes_project_inside_the_subspace() -> None:
    gradient = falling(24, 12)
    for side in SIDES:
        basis = svd_basis(gradient, side, RANK)
        low = basis.project(gradient)
        assert torch.allclose(basis.project(basis.back(low)), low, atol=1e-6)


def test_the_cheap_gate_asks_for_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the basis captures nearly all of the gradient, the exact energy is not needed."""
    gradient = falling(24, 12)
    basis = svd_basis(gradient, "right", RANK)

    def never(gradient: Tensor, rank: int) -> Tensor:
        raise AssertionError("asked for the exact energy")

    monkeypatch.setattr(projection, "exact_energy", never)
    assert captures_enough(gradient, basis, RANK)
