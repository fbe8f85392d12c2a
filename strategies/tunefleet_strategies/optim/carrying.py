"""What becomes of a run's state when a rank, an interval or the decay changes between two updates: pure functions.

Shapes: m rows and n columns of a weight, r the rank so far, r' the new one. A (r x n), B (m x r), s the scale of their
product; a prime marks what goes on. Nothing here knows a model: weights and optimizer state come by name or number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunefleet_strategies.optim.block_schedule import NEVER, Origin, updates_in_visit, visit_of
from tunefleet_strategies.optim.projection import Basis

State = dict[str, Any]
"""State of one parameter: tensors and plain numbers."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def decayed(optimizer: Mapping[str, Any], weight_decay: float) -> dict[str, Any]:
    """The same state with another decay, where its groups have one at all (`groups.grouped` names those without)."""
    groups = [
        group if str(group["name"]).endswith("_nodecay") else {**group, "weight_decay": weight_decay}
        for group in optimizer["param_groups"]
    ]
    return {**optimizer, "param_groups": groups}


# ---- LoRA: the factors of one layer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """The two factors of a layer, and the moments of each (none before a first update, and under SGD)."""

    a: Tensor  # (r, n)
    b: Tensor  # (m, r)
    a_state: State
    b_state: State


def resized_factors(old: Factors, rank: int, scale_ratio: float, fresh: Tensor, *, fresh_in_b: bool = False) -> Factors:
    """The factors at another rank: s' B' A' = s B A where the rank grows, else the best of that rank.

    Grown: A gets new rows and B new columns, one of them zero and the other drawn, as a new adapter has them. Cut: the
    leading singular triples of B A stay (Eckart & Young), in rows of A' that are as long as those of A were on average.
    Either way B' takes up what the scale has changed by.

    Moments follow the gradients: with A' = C A and B' = B D these are s'/s D^T dA and s'/s dB C^T, so first moments go
    over exactly and second ones with the squares of the coefficients, as if entries were independent. New ones are 0.

    Args:
        scale_ratio: s / s'.
        fresh: what new directions start from, (r', n), or (m, r') with `fresh_in_b`.
        fresh_in_b: whether what is drawn stands in B and the zeros in A, as in adapters of embeddings.
    """
    now, columns, rows = old.a.shape[0], old.a.shape[1], old.b.shape[0]
    if rank >= now:
        kept = Factors(old.a, _scaled(old.b, scale_ratio), dict(old.a_state), _moments_scaled(old.b_state, scale_ratio))
    else:
        kept = _cut(old, rank, scale_ratio)
    missing = rank - kept.a.shape[0]
    if missing == 0:
        return kept
    new_a = old.a.new_zeros((missing, columns)) if fresh_in_b else fresh[-missing:].to(old.a)
    new_b = fresh[:, -missing:].to(old.b) if fresh_in_b else old.b.new_zeros((rows, missing))
    return Factors(
        torch.cat([kept.a, new_a]),
        torch.cat([kept.b, new_b], dim=1),
        _moments_padded(kept.a_state, missing, 0),
        _moments_padded(kept.b_state, missing, 1),
    )


def _cut(old: Factors, rank: int, scale_ratio: float) -> Factors:
    """At most `rank` directions: those of the product that are there at all."""
    a, b = old.a.double(), old.b.double()
    left, upper = torch.linalg.qr(b)  # (m, r), (r, r)
    right, lower = torch.linalg.qr(a.mT)  # (n, r), (r, r)
    u, sizes, vh = torch.linalg.svd(upper @ lower.mT)  # of B A in the two bases: (r, r), (r,), (r, r)
    there = int((sizes > sizes[0] * 1e-9).sum()) if float(sizes[0]) > 0 else 0
    kept = min(rank, there)
    length = float(torch.linalg.vector_norm(a)) / math.sqrt(a.shape[0])
    new_a = length * (vh[:kept] @ right.mT)  # (k, n)
    new_b = (left @ u[:, :kept]) * (sizes[:kept] * scale_ratio / length)  # (m, k)
    c, d = new_a @ torch.linalg.pinv(a), torch.linalg.pinv(b) @ new_b  # (k, r), (r, k)
    return Factors(
        new_a.to(old.a).contiguous(),
        new_b.to(old.b).contiguous(),
        _moments_turned(old.a_state, d.mT / scale_ratio, left=True),
        _moments_turned(old.b_state, c.mT / scale_ratio, left=False),
    )


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _moments_scaled(state: State, ratio: float) -> State:
    """The moments of B, whose gradient is s'/s times what it was."""
    if "exp_avg" not in state or ratio == 1.0:
        return dict(state)
    first, second = state["exp_avg"] / ratio, state["exp_avg_sq"] / ratio**2
    return {**state, "exp_avg": first, "exp_avg_sq": second}


def _moments_turned(state: State, coefficients: Tensor, *, left: bool) -> State:
    """Moments of a gradient that is multiplied by coefficients, from the left or from the right."""
    if "exp_avg" not in state:
        return dict(state)
    turned = {}
    for name, factor in zip(_MOMENTS, (coefficients, coefficients.square()), strict=True):
        moment: Tensor = state[name]
        product = factor @ moment.double() if left else moment.double() @ factor
        turned[name] = product.to(moment).contiguous()
    return {**state, **turned}


def _moments_padded(state: State, count: int, dim: int) -> State:
    if "exp_avg" not in state:
        return dict(state)
    return {**state, **{name: _padded(state[name], count, dim) for name in _MOMENTS}}


def _padded(tensor: Tensor, count: int, dim: int) -> Tensor:
    """More entries along a dimension, all 0."""
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


# ---- GaLore: the subspace of one matrix -----------------------------------------------------------------------------


def resized_subspace(state: State, rank: int, generator: torch.Generator) -> State:
    """The state of a projected matrix at another rank, which is cut to the smaller side as everywhere.

    Cut, the leading basis vectors stay with their moments. Extended, the basis is completed by orthonormal vectors with
    moments 0. The next refresh finds a basis of the new rank from the gradient.
    """
    left, right = state.get("left"), state.get("right")
    sides = (0 if left is None else left.shape[-2], 0 if right is None else right.shape[-1])
    moment: Tensor = state["exp_avg"]
    rows, columns = sides[0] or moment.shape[-2], sides[1] or moment.shape[-1]
    wanted = min(rank, rows, columns)
    basis = Basis(
        None if left is None else _columns(left, wanted, generator),
        None if right is None else _columns(right.mT, wanted, generator).mT,
    )
    dtype = (left if left is not None else right).dtype  # type: ignore[union-attr]  # one of the two is there
    # The basis' columns are the moments' rows on the left, and its rows their columns on the right.
    dims = [dim for dim, side in ((-2, left), (-1, right)) if side is not None]
    moments = {name: _fitted(state[name], wanted, dims) for name in _MOMENTS}
    return {**state, **basis.stored_as(dtype).tensors(), **moments}


def _columns(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns (m, r) as (m, r'), in fp32 where there are new ones."""
    missing = count - vectors.shape[-1]
    if missing <= 0:
        return vectors[..., :count]
    drawn = torch.randn((*vectors.shape[:-1], missing), generator=generator)
    # The first columns come out as they were but for signs and rounding: those that there are stay bit for bit.
    whole, _ = torch.linalg.qr(torch.cat([vectors.float().cpu(), drawn], dim=-1))
    return torch.cat([vectors.float(), whole[..., vectors.shape[-1] :].to(vectors.device)], dim=-1)


def _fitted(moment: Tensor, count: int, dims: list[int]) -> Tensor:
    for dim in dims:
        missing = count - moment.shape[dim]
        moment = moment.narrow(dim, 0, count) if missing <= 0 else _padded(moment, missing, dim)
    return moment.clone(memory_format=torch.contiguous_format)  # a view would keep what was cut off alive


# ---- BAdam: the visit under way -------------------------------------------------------------------------------------


def resized_visit(optimizer: Mapping[str, Any], interval: int) -> dict[str, Any]:
    """The state of a walk over blocks or windows whose visits last otherwise from now on.

    The visit under way goes on, with its moments and its count of updates, until it has had the new number; where it
    has had them already, the next one begins now. What was visited before stays visited: the walk does not jump.
    """
    before, updates = optimizer["settings"]["interval"], optimizer["updates"]
    origin = Origin(*optimizer["origin"])
    visit, had = visit_of(updates, before, origin), updates_in_visit(updates, before, origin)
    goes_on = interval == NEVER or had < interval
    begun = [updates - had, visit] if goes_on else [updates, visit + 1]
    settings = {**optimizer["settings"], "interval": interval}
    return {**optimizer, "origin": begun, "settings": settings, "state": optimizer["state"] if goes_on else {}}
