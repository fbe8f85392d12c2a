"""What a tuning method is: its arguments are the fields of a `Strategy`, its behaviour the methods.

This package is a plain PyTorch library. It knows neither Ray nor the platform that runs it: whoever owns a training
loop can load a model, call `attach`, build the optimizer and train.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.parts import Anatomy

Sharding = Literal["zero0", "zero1", "zero2", "zero3", "fsdp2"]
OptimizerName = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd"]

ADAMW: frozenset[OptimizerName] = frozenset({"adamw_torch", "adamw_torch_fused"})
"""The names of torch's AdamW."""


@dataclass(frozen=True)
class Traits:
    """What a method needs from the place that runs it. The planner reads these; it never asks for a method's name."""

    max_workers: int | None = None
    """Most data-parallel workers that give the right result; None = any number."""
    limited_by: str | None = None
    """The line of the recipe that limits the method so (`badam_mode: ratio`); None = it is the method itself."""
    shardings: frozenset[Sharding] = frozenset()
    """Engines other than plain data parallelism that give the right result."""
    accumulation: bool = True
    """Whether an update's gradient may come from several backward passes (micro-batches, or chunks of the loss)."""
    clipping: bool = True
    """Whether the norm of the whole gradient is known before it is used."""
    decay: bool = True
    """Whether the optimizer knows weight decay."""
    resumable: bool = True
    """Whether the optimizer state can be saved."""
    optimizers: frozenset[OptimizerName] = ADAMW | {"sgd"}
    """Values of `optim` that the method can carry out."""
    in_turns: bool = False
    """Whether parts of the model train in turns, each with state of its own for as long (then the optimizer is an
    `InTurns`)."""
    trains_base: bool = True
    """Whether weights of the base model itself change (full, freeze); False: the base stays as it is (LoRA)."""


@dataclass(frozen=True)
class Precision:
    """Which number format holds what. `compute` differs from `trainable` exactly when autocast runs."""

    compute: torch.dtype
    trainable: torch.dtype
    frozen: torch.dtype

    @property
    def autocast(self) -> bool:
        return self.compute != self.trainable


@dataclass(frozen=True)
class AttachContext:
    """What `attach` may know of the run it is part of."""

    precision: Precision
    seed: int = 0
    is_source: bool = True
    """Whether this process's values count. The others receive them by broadcast, so they may skip costly work."""
    initial: Mapping[str, Tensor] | None = None
    """What `initial_state` returned when the run began; None when it begins now."""
    gather: Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]] = lambda _: nullcontext()
    """Inside it the named parameters have their whole values, and what the source writes into them is kept. Entered on
    every process alike. Weights that are shared out over processes have their shapes outside it, and no values."""


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer that a recipe asks for, in plain numbers."""

    name: OptimizerName
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    seed: int = 0
    """What a method draws while it trains comes from private generators keyed by this."""


class MethodOptimizer(Optimizer):
    """An optimizer that does more than step: it may narrow what trains, work during the backward pass, or speak.

    It may set `requires_grad` of parameters that `Strategy.attach` made trainable, at the end of `step` and of
    `load_state_dict`: engines reduce, clip and clear what requires a gradient at the time.
    """

    steps_in_backward: bool = False
    """Whether parameters change, and their gradients go, while the backward pass runs; `step` then ends the update."""

    def gradient_norm(self) -> Tensor | None:
        """Norm of the part of the gradient that the update uses, fp32 scalar; None = of everything that has one.

        Asked once before each `step`; with `steps_in_backward` it is the norm of what has been used up.
        """
        return None

    def messages(self) -> list[str]:
        """What a person asked to be told of the updates since the last call (verbose modes)."""
        return []

    def measurements(self) -> dict[str, float]:
        """Figures of the last update for the record, by the name that they have there. The same on every worker.

        Asked only when they are written, so whatever waits for the device belongs here and not in `step`.
        """
        return {}


class InTurns(MethodOptimizer, ABC):
    """An optimizer that trains one part of the parameters for some updates, then another, each time with fresh state.

    Whoever owns the updates itself (an engine that shares state out) takes `turn_optimizer` for each turn, calls
    `advance` after every update that it has applied, and never calls `step`.
    """

    updates: int
    """Updates applied."""

    @abstractmethod
    def turn_optimizer(self) -> Optimizer:
        """A plain optimizer over what trains now, without state. Its groups are named as those of this one."""

    @abstractmethod
    def advance(self) -> bool:
        """Count an update. True = another turn begins with the next one, and what trains has been narrowed to it."""

    @abstractmethod
    def stand_at(self, updates: int) -> None:
        """Narrow what trains to the turn that stands after so many updates."""


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of a model with its method attached."""

    name: str
    shape: tuple[int, ...]
    trainable: bool

    @property
    def numel(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count


@dataclass(frozen=True)
class ModelShape:
    """The architecture of a model with its method attached, read from meta tensors: no weights are loaded."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    parameters: tuple[ParameterShape, ...] = field(repr=False)
    anatomy: Anatomy | None = field(default=None, repr=False)
    """None where adapters stand around the modules, or where layers cannot be told apart."""

    @property
    def total(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def trainable(self) -> int:
        return sum(p.numel for p in self.parameters if p.trainable)


@dataclass(frozen=True)
class Footprint:
    """Bytes that a method keeps on each worker, activations apart."""

    weights: int
    gradients: int
    optimizer_state: int


@dataclass(frozen=True)
class Saved:
    """What a run by a method keeps between two updates, where every worker holds everything."""

    weights: Mapping[str, Tensor]
    """What trains, and all buffers, by name."""
    optimizer: Mapping[str, Any]
    """The optimizer's state dict."""
    numbered: tuple[str, ...]
    """The names of the parameters whose state stands there under a number, by that number."""


@dataclass(frozen=True)
class Choice:
    values: tuple[object, ...]


@dataclass(frozen=True)
class Uniform:
    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    low: float
    high: float


@dataclass(frozen=True)
class QUniform:
    """From `low` upwards in steps, as far as `high`."""

    low: float
    high: float
    step: float


@dataclass(frozen=True)
class RandInt:
    low: int
    high: int
    """Exclusive."""


Domain = Choice | Uniform | LogUniform | QUniform | RandInt


class Strategy(BaseModel, ABC):
    """One tuning method.

    Fields carry the documented argument names and defaults. The class variables say how a recipe selects the method:
    `selector` maps the choosing keys (`finetuning_type`, `use_galore`, `use_badam`) to the values that mean this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    summary: ClassVar[str]
    selector: ClassVar[Mapping[str, object]]
    forms: ClassVar[Mapping[str, Mapping[str, object]]] = MappingProxyType({})
    """Settings that give the method other traits than its defaults, by the words that name them."""
    free: ClassVar[frozenset[str]] = frozenset()
    """Arguments that change no number that is trained, so that an interrupted run may go on with others."""

    @abstractmethod
    def traits(self) -> Traits:
        """What the method needs from the place that runs it."""

    def label(self) -> str:
        """The method, and the line of the recipe that limits where it runs, as messages name it."""
        line = self.traits().limited_by
        return self.name if line is None else f"{self.name} with {line}"

    def refuse_optimizer(self, name: OptimizerName) -> None:
        """Refuse an optimizer that the traits do not name.

        Raises:
            StrategyError: the method cannot carry it out.
        """
        if name not in self.traits().optimizers:
            owner = " (it belongs to optimizer_backend: upstream)" if name == "adamw_8bit" else ""
            raise StrategyError(f"{self.label()} cannot use optim: {name}{owner}; write optim: adamw_torch")

    def unused(self) -> Mapping[str, str]:
        """Arguments that do nothing beside the others, each with the reason ("badam_mode is layer")."""
        return {}

    @abstractmethod
    def attach(self, model: nn.Module, context: AttachContext) -> nn.Module:
        """Say what exists and what may change: add modules, set `requires_grad` on every parameter.

        A parameter that changes in some part of the run only requires a gradient here too; the optimizer narrows it.
        Works on meta tensors too (then no values are computed). Draws from private generators only.

        Raises:
            StrategyError: a target matches nothing, or the architecture lacks what the method needs.
        """

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors of the freshly attached model that later steps need unchanged (PiSSA's A0 and B0)."""
        return {}

    def base_name(self, name: str) -> str:
        """What a parameter of the attached model is called in the base, if it is one of the base's or a copy of one."""
        return name

    def complete(self, model: nn.Module, weight: Callable[[str], Tensor]) -> None:
        """Compute the start values that depend on base weights, for a model that was attached while those were nan.

        Args:
            weight: reads one weight of the base whole, by its name there.
        """

    def notices(self, model: nn.Module, updates: int | None = None, seed: int | None = None) -> list[str]:
        """Sentences that a person should read before the run starts.

        Args:
            model: attached, possibly on meta tensors.
            updates: how many the run has, where that is known.
            seed: what the run draws by, where that is known.
        """
        return []

    @abstractmethod
    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """Say how the trainable parameters change."""

    @abstractmethod
    def footprint(self, shape: ModelShape, precision: Precision) -> Footprint:
        """Count the bytes of weights, gradients and optimizer state on each worker."""

    @abstractmethod
    def search_space(self) -> dict[str, Domain]:
        """The domains that a search over this method draws from, by argument."""

    def refuse_search(self, keys: frozenset[str]) -> None:
        """Refuse a search over these arguments, where it would search two things at once.

        Raises:
            StrategyError: it would.
        """

    def mutable(self) -> Mapping[str, str | None]:
        """Arguments that may change between two updates because `carried` knows what becomes of the state.

        Each with None, or with the reason why it may not beside the other arguments ("pissa_init is on").
        """
        return {}

    def carried(self, saved: Saved, now: Self, seed: int) -> Saved:
        """The state from which a run goes on that changes to other arguments now.

        Args:
            now: the same method; only arguments differ that `mutable` allows.
            seed: what new directions are drawn by.

        Raises:
            StrategyError: the state does not allow it; the argument is named.
        """
        return saved

    @abstractmethod
    def export(self, model: nn.Module, folder: Path, initial: Mapping[str, Tensor]) -> None:
        """Write what a user keeps, in Hugging Face or PEFT format, to an existing folder."""
