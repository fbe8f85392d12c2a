"""What a plan is made from, besides the recipe and the model: the shape of the cluster and of the data, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tunefleet.hardware import Hardware

TRIAL_DRIVER = "trial_driver"
"""The resource that nodes offer on which the drivers of trials may sit."""


@dataclass(frozen=True)
class NodeShape:
    """What one machine offers."""

    cpus: float
    gpus: float = 0.0
    others: Mapping[str, float] | None = None
    """By name: bytes of `memory`, and custom resources."""

    def fits(self, request: Mapping[str, float]) -> int:
        """How many workers of this size the machine holds."""
        asked = {name: amount for name, amount in request.items() if amount > 0}
        return min((int(self.amount(name) / amount + 1e-9) for name, amount in asked.items()), default=0)

    def amount(self, resource: str) -> float:
        """How much of a resource the machine offers, by Ray's name of it."""
        return {"CPU": self.cpus, "GPU": self.gpus, **(self.others or {})}.get(resource, 0.0)


@dataclass(frozen=True)
class ClusterShape:
    """The machines that a run may use, and what their processors can do."""

    nodes: tuple[NodeShape, ...]
    cpu: Hardware
    gpu: Hardware | None = None
    """None where no machine has one, or none that could be asked."""
    may_grow: bool = False
    """Whether nodes may come and go: a cluster that others run, not this machine."""

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def amount(self, resource: str) -> float:
        """How much of a resource the machines offer together, by Ray's name of it."""
        return sum(node.amount(resource) for node in self.nodes)

    def fits(self, request: Mapping[str, float], placement_strategy: str = "PACK") -> int:
        """How many workers of this size the machines hold when they are laid out so."""
        held = [node.fits(request) for node in self.nodes]
        if placement_strategy == "STRICT_PACK":
            return max(held, default=0)
        if placement_strategy == "STRICT_SPREAD":
            return sum(room > 0 for room in held)
        return sum(held)

    def hardware(self, device: Literal["cpu", "cuda"]) -> Hardware:
        """What trains where the workers get this device."""
        return self.gpu if device == "cuda" and self.gpu is not None else self.cpu


@dataclass(frozen=True)
class SplitShape:
    """Size of one tokenised split."""

    rows: int
    tokens: int
    target_tokens: int


@dataclass(frozen=True)
class DataShape:
    """What the token cache holds for a recipe."""

    train: SplitShape
    evaluation: SplitShape | None
    train_sha256: str
    """Hash of the training rows as tokens."""
    bad_rows: int = 0
