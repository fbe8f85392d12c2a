"""What a plan is made from, besides the recipe and the model: the shape of the cluster and of the data, in numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tunefleet.hardware import Hardware

TRIAL_DRIVER = "trial_driver"
"""The resource that nodes offer on which the drivers of trials may sit."""
SINGLE_WORKER = "tunefleet.io/single-worker"
"""The label, with the value `true`, of nodes that are kept for runs whose method allows one worker only."""


@dataclass(frozen=True)
class NodeShape:
    """What one machine offers."""

    cpus: float
    gpus: float = 0.0
    others: Mapping[str, float] | None = None
    """By name: bytes of `memory`, and custom resources."""
    labels: Mapping[str, str] | None = None
    """As Ray knows them."""

    def is_as(self, labels: Mapping[str, str]) -> bool:
        """Whether the labels are as asked; `!x` asks for another value than x, or for none."""
        own = self.labels or {}
        return all(
            own.get(name) != value.removeprefix("!") if value.startswith("!") else own.get(name) == value
            for name, value in labels.items()
        )

    def fits(self, request: Mapping[str, float]) -> int:
        """How many workers of this size the machine holds."""
        asked = {name: amount for name, amount in request.items() if amount > 0}
        return min((_times(self.amount(name), amount) for name, amount in asked.items()), default=0)

    def amount(self, resource: str) -> float:
        """How much of a resource the machine offers, by Ray's name of it."""
        return self.offered.get(resource, 0.0)

    @property
    def offered(self) -> dict[str, float]:
        """The amounts by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, **(self.others or {})}


def _times(offered: float, amount: float) -> int:
    return sys.maxsize if offered == math.inf else int(offered / amount + 1e-9)


@dataclass(frozen=True)
class NodeType:
    """Alike machines that an autoscaler starts and takes away again."""

    name: str
    shape: NodeShape
    most: int
    """So many at the same time."""

    def in_words(self) -> str:
        offered = self.shape.offered
        held = ", ".join(f"{amount:g} {name}" for name, amount in offered.items() if 0 < amount < math.inf)
        return f"{self.name} ({held}; at most {self.most})"


def at_most(alive: Sequence[NodeShape], types: Sequence[NodeType]) -> tuple[NodeShape, ...]:
    """The machines of a cluster that has grown as far as it can: those of no type, and of each type all."""
    still = {one.name: one.most for one in types}
    kept: list[NodeShape] = []
    for node in alive:
        own = next((one for one in types if still[one.name] and _is_alike(node, one.shape)), None)
        if own is None:
            kept.append(node)
        else:
            still[own.name] -= 1
    return (*kept, *(one.shape for one in types for _ in range(one.most)))


def _is_alike(node: NodeShape, shape: NodeShape) -> bool:
    """Whether a machine is of a type, as far as its amounts and labels tell."""
    others = node.others or {}
    return (
        (node.cpus, node.gpus) == (shape.cpus, shape.gpus)
        and all(others.get(name) == amount for name, amount in (shape.others or {}).items() if name != "memory")
        and node.is_as(shape.labels or {})
    )


@dataclass(frozen=True)
class ClusterShape:
    """The machines that a run may use, and what their processors can do."""

    nodes: tuple[NodeShape, ...]
    """Where `node_types` are known, those that there may be; else those that there are."""
    cpu: Hardware
    gpu: Hardware | None = None
    """None where no machine has one, or none that could be asked."""
    may_grow: bool = False
    """Whether nodes may come and go: a cluster that others run, not this machine."""
    node_types: tuple[NodeType, ...] = ()
    """What the cluster's autoscaler can start; empty where there is none, or nobody says."""

    @property
    def bounded(self) -> bool:
        """Whether `nodes` are all that there will ever be."""
        return not self.may_grow or bool(self.node_types)

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def amount(self, resource: str) -> float:
        """How much of a resource the machines offer together, by Ray's name of it."""
        return sum(node.amount(resource) for node in self.nodes)

    def fits(
        self,
        request: Mapping[str, float],
        placement_strategy: str = "PACK",
        labels: Mapping[str, str] | None = None,
    ) -> int:
        """How many workers of this size the machines with such labels hold when they are laid out so."""
        held = [node.fits(request) for node in self.nodes if node.is_as(labels or {})]
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
