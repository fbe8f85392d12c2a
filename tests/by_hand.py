"""Bytes of optimizer state, counted by hand from the shapes of a Llama (exactness.md A5, B6 and C4; never `footprint`).

m rows and n columns of a matrix, r rank, q bytes of a weight (and of a basis entry), 4 bytes of a moment or master.
"""

from __future__ import annotations

from dataclasses import dataclass

MOMENT, WHOLE_BELOW = 4, 100


@dataclass(frozen=True)
class Llama:
    """The numbers of a configuration that decide every shape. Embedding and head are two matrices."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    key_value: int
    """Key-value heads times the width of a head."""

    def matrices(self) -> list[tuple[int, int]]:
        """(m, n) of the linear maps of one layer: q, k, v, o, gate, up, down."""
        wide, narrow, inner = self.hidden, self.key_value, self.intermediate
        return [(wide, wide), (narrow, wide), (narrow, wide), (wide, wide), (inner, wide), (inner, wide), (wide, inner)]

    def layer(self) -> list[int]:
        """Entries of each parameter of one layer, its two norms last."""
        return [m * n for m, n in self.matrices()] + [self.hidden, self.hidden]

    def outside(self) -> list[int]:
        """Entries of embedding, final norm and head."""
        return [self.vocabulary * self.hidden, self.hidden, self.vocabulary * self.hidden]

    def total(self) -> int:
        return self.layers * sum(self.layer()) + sum(self.outside())

    def parameters(self) -> int:
        """How many tensors there are."""
        return self.layers * len(self.layer()) + len(self.outside())


def full(model: Llama, q: int) -> int:
    """AdamW: both moments in the weight's format, and the step counter of torch's fused kernel for each tensor."""
    return 2 * q * model.total() + 4 * model.parameters()


def galore(model: Llama, q: int, rank: int, projection: str = "std") -> int:
    """Basis and moments of the layers' matrices; moments of everything else."""
    state = 0
    for m, n in model.matrices():
        r = min(rank, m, n)
        right, left = q * r * n + 2 * MOMENT * m * r, q * m * r + 2 * MOMENT * r * n
        state += {
            "std": right if m >= n else left,
            "reverse_std": left if m >= n else right,
            "right": right,
            "left": left,
            "full": q * r * (m + n) + 2 * MOMENT * r * r,
        }[projection]
    others = model.layers * 2 * model.hidden + sum(model.outside())
    return model.layers * state + 2 * MOMENT * others


def badam_layer(entries: int, q: int) -> int:
    """Moments of the active block, and its master copy where the weights are bf16."""
    return (8 if q == 4 else 12) * entries


def active(entries: int, ratio: float) -> int:
    return entries if entries < WHOLE_BELOW else max(1, int(entries * ratio))


def badam_ratio(model: Llama, q: int, ratio: float, *, scatter: bool = False) -> int:
    """The same of the active entries of the layers, and 4 bytes for the place of each that is spread."""
    counts = model.layers * model.layer()
    kept = sum(active(entries, ratio) for entries in counts)
    spread = sum(active(entries, ratio) for entries in counts if active(entries, ratio) < entries)
    return (8 if q == 4 else 12) * kept + (4 * spread if scatter else 0)
