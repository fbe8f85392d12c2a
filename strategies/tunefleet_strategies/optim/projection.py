"""The subspace that GaLore keeps an optimizer's moments in, and three ways to find it.

Shapes: m rows and n columns of a weight's gradient G, k = min(m, n), r rank. Every tensor may have one more dimension
in front: the experts of a fused tensor, each with a basis of its own.

    left  (m, r)  orthonormal columns U      project  R = U^T G        (r, n)    back  U N
    right (r, n)  orthonormal rows V^T       project  R = G V          (m, r)    back  N V^T
    both                                     project  R = U^T G V      (r, r)    back  U N V^T

(Zhao et al., arXiv 2403.03507, equations 12 and 13.) The best basis of rank r, the one that captures most of ||G||^2,
holds the first singular vectors of G. Bases are compact copies in LAPACK's column-major strides: a view would keep all
of U alive, and other strides change the bits of the products that follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Projection = Literal["std", "reverse_std", "right", "left", "full"]
Refresh = Literal["svd", "eigh", "subspace"]
Side = Literal["left", "right", "both"]

ENERGY_GATE = 0.99
"""The part of the exact basis' energy that a basis found by subspace iteration must capture to be taken."""


def side_of(projection: Projection, rows: int, columns: int) -> Side:
    """Which side of a gradient is projected: `std` makes its longer side the one that stays."""
    if projection == "full":
        return "both"
    if projection in ("left", "right"):
        return projection
    tall = rows >= columns
    return "right" if tall == (projection == "std") else "left"


@dataclass(frozen=True)
class Entries:
    """Sizes of what is kept for one projected matrix, in numbers of entries."""

    basis: int
    moment: int


def kept_entries(projection: Projection, rank: int, shape: Sequence[int]) -> Entries:
    """What a weight (m, n) or (experts, m, n) keeps at a rank, which is cut to the smaller side."""
    *experts, rows, columns = shape
    rank = min(rank, rows, columns)
    side = side_of(projection, rows, columns)
    basis = {"right": rank * columns, "left": rows * rank, "both": rank * (rows + columns)}[side]
    moment = {"right": rows * rank, "left": rank * columns, "both": rank * rank}[side]
    return Entries(math.prod(experts) * basis, math.prod(experts) * moment)


@dataclass(frozen=True)
class Basis:
    """Orthonormal vectors on one side of a gradient, or on both. None: that side is not projected."""

    left: Tensor | None  # (m, r)
    right: Tensor | None  # (r, n)

    def project(self, gradient: Tensor) -> Tensor:
        """The gradient's coordinates in the subspace."""
        low = gradient if self.left is None else self.left.mT @ gradient
        return low if self.right is None else low @ self.right.mT

    def back(self, low: Tensor) -> Tensor:
        """The matrix (m, n) that has these coordinates."""
        half = low if self.left is None else self.left @ low
        return half if self.right is None else half @ self.right

    def stored_as(self, dtype: torch.dtype) -> Basis:
        """A compact column-major copy in the number format of the weight."""
        left, right = (None if side is None else _compact(side.to(dtype)) for side in (self.left, self.right))
        return Basis(left, right)

    def tensors(self) -> dict[str, Tensor]:
        """The sides that there are, by name."""
        return {name: side for name, side in (("left", self.left), ("right", self.right)) if side is not None}


def empty_basis(side: Side, rank: int, like: Tensor) -> Basis:
    """Room for the basis of a weight, in the layout that `stored_as` gives."""
    *experts, rows, columns = like.shape
    left, right = like.new_empty((*experts, rank, rows)).mT, like.new_empty((*experts, columns, rank)).mT
    return Basis(None if side == "right" else left, None if side == "left" else right)


def find_basis(gradient: Tensor, side: Side, rank: int, refresh: Refresh, previous: Basis | None) -> tuple[Basis, bool]:
    """The basis for a gradient, in fp32.

    Args:
        previous: the basis so far. `eigh` and `subspace` take their signs from it, so that moments keep their meaning
            where a vector has not moved, and rounding cannot flip one; `subspace` starts from it.

    Returns:
        The basis, and whether `subspace` had to fall back to the exact one.
    """
    gradient = gradient.float()
    if refresh == "svd":
        return svd_basis(gradient, side, rank), False
    if previous is None:
        return eigh_basis(gradient, side, rank), False
    if refresh == "subspace":
        moved = subspace_basis(gradient, side, previous)
        if captures_enough(gradient, moved, rank):
            return moved, False
    return aligned(eigh_basis(gradient, side, rank), previous), refresh == "subspace"


def svd_basis(gradient: Tensor, side: Side, rank: int) -> Basis:
    """The exact basis by singular value decomposition, signs as LAPACK leaves them: what galore-torch does."""
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)  # (m, k), (k,), (k, n)
    return _one_sided(left[..., :rank], right[..., :rank, :], side)


def eigh_basis(gradient: Tensor, side: Side, rank: int) -> Basis:
    """The exact basis by the eigenvectors of the smaller Gram matrix; the other side follows from G = U S V^T.

    Squaring loses the vectors whose singular values are below 3e-4 of the largest; their energy is below 1e-7 of it.
    """
    rows, columns = gradient.shape[-2:]
    if rows >= columns:
        _, vectors = torch.linalg.eigh(gradient.mT @ gradient)  # (n, n), by rising eigenvalue
        right = vectors[..., -rank:].flip(-1)  # (n, r)
        left = right if side == "right" else _orthonormal(gradient @ right)
    else:
        _, vectors = torch.linalg.eigh(gradient @ gradient.mT)  # (m, m)
        left = vectors[..., -rank:].flip(-1)  # (m, r)
        right = left if side == "left" else _orthonormal(gradient.mT @ left)
    return _one_sided(left, right.mT, side)


def subspace_basis(gradient: Tensor, side: Side, previous: Basis) -> Basis:
    """One step of subspace iteration, warm-started: V <- orth(G^T G V) (Golub & Van Loan, section 7.3.2)."""
    if side == "left":
        assert previous.left is not None
        left = _orthonormal(gradient @ (gradient.mT @ previous.left.float()))
        return Basis(left, None)
    assert previous.right is not None
    right = _orthonormal(gradient.mT @ (gradient @ previous.right.float().mT))  # (n, r)
    if side == "right":
        return Basis(None, right.mT)
    return Basis(_orthonormal(gradient @ right), right.mT)


def aligned(basis: Basis, previous: Basis) -> Basis:
    """The same basis, each vector turned to the side of the one that stood in its place: eigenvectors have no sign."""
    left, right = basis.left, basis.right
    if left is not None and previous.left is not None:
        left = left * _signs((left * previous.left).sum(-2, keepdim=True))  # (m, r) times (1, r)
    if right is not None and previous.right is not None:
        right = right * _signs((right * previous.right).sum(-1, keepdim=True))  # (r, n) times (r, 1)
    return Basis(left, right)


def captures_enough(gradient: Tensor, basis: Basis, rank: int) -> bool:
    """Whether a basis captures `ENERGY_GATE` of the energy ||R||^2 that the exact one would, for every expert.

    The exact one captures at most ||G||^2, which is compared first because it is cheap.
    """
    captured = _energy(basis.project(gradient))
    if bool((captured >= ENERGY_GATE * _energy(gradient)).all()):
        return True
    return bool((captured >= ENERGY_GATE * exact_energy(gradient, rank)).all())


def exact_energy(gradient: Tensor, rank: int) -> Tensor:
    """The energy that no basis of this rank can exceed: the sum of the largest squared singular values."""
    rows, columns = gradient.shape[-2:]
    gram = gradient.mT @ gradient if rows >= columns else gradient @ gradient.mT  # (k, k)
    energies: Tensor = torch.linalg.eigvalsh(gram)[..., -rank:].sum(-1)
    return energies


def _energy(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    return norms.square()


def _one_sided(left: Tensor, right: Tensor, side: Side) -> Basis:
    return Basis(None if side == "right" else left, None if side == "left" else right)


def _orthonormal(matrix: Tensor) -> Tensor:
    """Columns of the QR decomposition whose R has a positive diagonal."""
    vectors, upper = torch.linalg.qr(matrix)
    turned: Tensor = vectors * _signs(upper.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
    return turned


def _signs(numbers: Tensor) -> Tensor:
    """1 or -1, never 0."""
    return torch.where(numbers < 0, -1.0, 1.0)


def _compact(side: Tensor) -> Tensor:
    """The same values in column-major strides, in a storage that holds nothing else."""
    packed = side.mT.contiguous()
    if packed.untyped_storage().nbytes() > packed.numel() * packed.itemsize:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.mT
