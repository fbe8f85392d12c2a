"""GaLore's AdamW: the moments of a matrix live in a subspace of its gradient (Zhao et al., arXiv 2403.03507).

Shapes: a weight and its gradient G are (m, n), or (experts, m, n); low-rank tensors R are (m, r), (r, n) or (r, r),
as `optim/projection.py` says. t is the number of a parameter's update, from 1.

One update of a projected matrix (algorithm 2 of the paper, rules of galore-torch 1.0):

    every `update_interval` updates, from its first on: find the basis of G
    R = project(G)                                           G itself where there is no basis
    m = b1 m + (1 - b1) R,   v = b2 v + (1 - b2) R^2         always in fp32
    u = lr scale back(m / (sqrt(v) + eps)) sqrt(1 - b2^t) / (1 - b1^t)
    p = (p - u) (1 - lr decay)                               decay comes last, and without scale

This differs from torch's AdamW in two places: eps is not bias-corrected, and decay follows the update. torch's fused
kernel computes the same with eps / sqrt(1 - b2^t) in place of eps and without decay.

Moments are not turned when a basis changes, as in the paper. Parameters that are not projected follow the same rule
with the identity for a basis and scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tunefleet_strategies.contract import MethodOptimizer, OptimizerSpec
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.draws import generator_of
from tunefleet_strategies.optim.fused_adamw import Operands, fused_adamw
from tunefleet_strategies.optim.groups import Group
from tunefleet_strategies.optim.projection import Basis, Refresh, empty_basis, find_basis, side_of
from tunefleet_strategies.optim.rounding import Rounding, rounded

_PIECE_ENTRIES = 2**24
"""Entries of the weights that are updated together: bounds what lives in passing. A larger weight is alone."""

_BUCKET_ENTRIES = 2**26
"""Entries of bases that travel in one broadcast."""


@dataclass(frozen=True)
class Behaviour:
    """How updates are made, whatever the parameter."""

    refresh: Refresh = "svd"
    stagger: bool = False
    """Spread the refreshes over the interval instead of making all of them in one update."""
    rounding: Rounding = "nearest"
    layerwise: bool = False
    """Update each parameter during the backward pass, as soon as its gradient is there, and free the gradient."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter stands in the optimizer."""

    group: int
    number: int
    """Its position among all parameters: the number of its state in a state dict."""
    offset: int
    """Updates by which its refreshes come early under `stagger`."""


@dataclass
class _Change:
    """How many weights in half precision an update has really changed; the counts stay on their device."""

    counts: list[Tensor] = field(default_factory=list)
    entries: int = 0


class GaLoreAdamW(MethodOptimizer):
    """AdamW with projected moments.

    A group with a `rank` is projected and has `projection`, `update_interval` and `scale`; other groups get plain AdamW
    by the same rule. State of each parameter: `step` (a plain number), `exp_avg`, `exp_avg_sq`, and of a projected one
    its basis `left` and/or `right`.
    """

    def __init__(self, groups: Sequence[Group], spec: OptimizerSpec, behaviour: Behaviour) -> None:
        """
        Raises:
            StrategyError: layerwise updates with several workers, whose gradients would never be added up.
        """
        adam: Group = {
            "lr": spec.learning_rate,
            "betas": spec.betas,
            "eps": spec.eps,
            "weight_decay": spec.weight_decay,
        }
        defaults = adam | {"rank": None, "projection": "std", "update_interval": 1, "scale": 1.0}
        super().__init__(groups, defaults)
        self.steps_in_backward = behaviour.layerwise
        self._behaviour = behaviour
        self._seed = spec.seed
        self._places = _places(self.param_groups, stagger=behaviour.stagger)
        self._used: dict[Tensor, Tensor] = {}
        """Layerwise: the norms of the gradients that the present backward pass has used up."""
        self._change, self._last_change = _Change(), _Change()
        self._messages: list[str] = []
        if behaviour.layerwise:
            if _world() > 1:
                raise StrategyError(
                    f"galore_layerwise uses up each gradient where it arises, but there are {_world()} workers; write "
                    "ray_num_workers: 1, or galore_layerwise: false"
                )
            for parameter in self._places:
                parameter.register_post_accumulate_grad_hook(self._use)

    # ---- the update ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply every gradient there is; layerwise, end the update that the backward pass has made.

        Collective where a basis is refreshed and there are several workers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._behaviour.layerwise:
            self._use_nothing()
            self._used.clear()
        else:
            self._apply([parameter for parameter in self._places if parameter.grad is not None])
        self._change, self._last_change = _Change(), self._change
        return loss

    def _apply(self, parameters: Sequence[Tensor]) -> None:
        """Refresh the bases that are due, then update in batches of parameters that share their numbers."""
        self._refresh([parameter for parameter in parameters if self._is_due(parameter)])
        batches: dict[tuple[object, ...], list[Tensor]] = {}
        for parameter in parameters:
            place, done = self._places[parameter], self._updates_of(parameter)
            batches.setdefault((place.group, done, parameter.dtype, parameter.device), []).append(parameter)
        for batch in batches.values():
            group, t = self.param_groups[self._places[batch[0]].group], self._updates_of(batch[0]) + 1
            for piece in _pieces(batch, _PIECE_ENTRIES):
                self._update(piece, group, t)

    def _update(self, parameters: list[Tensor], group: Group, t: int) -> None:
        """Update parameters of one group, number format and t. See the formulas at the top."""
        decay = group["lr"] * group["weight_decay"]
        gradients = [_gradient(parameter) for parameter in parameters]
        if group["rank"] is None and parameters[0].dtype == torch.float32:
            self._adam(parameters, parameters, gradients, group, t, group["lr"])
            _decay(parameters, decay)
            return
        bases = [self._basis(parameter) for parameter in parameters]
        low = [basis.project(gradient).float() for basis, gradient in zip(bases, gradients, strict=True)]
        directions = [torch.zeros_like(one) for one in low]  # the kernel subtracts from these, at rate 1
        self._adam(parameters, directions, low, group, t, 1.0)
        updates = [
            direction if group["rank"] is None else basis.back(direction.to(parameter.dtype))
            for parameter, basis, direction in zip(parameters, bases, directions, strict=True)
        ]
        rate = group["lr"] * (1.0 if group["rank"] is None else group["scale"])
        if parameters[0].dtype == torch.float32:
            torch._foreach_add_(parameters, updates, alpha=rate)
            _decay(parameters, decay)
            return
        for parameter, update in zip(parameters, updates, strict=True):
            self._write_half(parameter, parameter.float().add_(update, alpha=rate).mul_(1.0 - decay), t)

    def _adam(
        self, owners: list[Tensor], targets: list[Tensor], gradients: list[Tensor], group: Group, t: int, rate: float
    ) -> None:
        """target <- target - rate m / (sqrt(v) + eps) sqrt(1 - b2^t) / (1 - b1^t), with the moments of the owners."""
        states = [self.state[owner] for owner in owners]
        for state, gradient in zip(states, gradients, strict=True):
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            state["step"] = t
        moments = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        fused_adamw(
            Operands(targets, gradients, *moments),
            step=t,
            learning_rate=rate,
            betas=group["betas"],
            eps=group["eps"] / math.sqrt(1.0 - group["betas"][1] ** t),
            weight_decay=0.0,
        )

    def _write_half(self, parameter: Tensor, exact: Tensor, t: int) -> None:
        """Round fp32 values into a parameter in half precision, and count the entries that this changes."""
        generator = None
        if self._behaviour.rounding == "stochastic":
            generator = generator_of(self._seed, "rounding", t, self._places[parameter].number, device=parameter.device)
        new = rounded(exact, parameter.dtype, generator)
        self._change.counts.append((new != parameter).sum())
        self._change.entries += parameter.numel()
        parameter.copy_(new)

    # ---- bases --------------------------------------------------------------------------------------------------

    def _is_due(self, parameter: Tensor) -> bool:
        """Whether a parameter's basis is refreshed at its next update. Its own first update always does."""
        place = self._places[parameter]
        group, done = self.param_groups[place.group], self._updates_of(parameter)
        if group["rank"] is None:
            return False
        return done == 0 or (done + place.offset) % group["update_interval"] == 0

    def _refresh(self, due: Sequence[Tensor]) -> None:
        """Give parameters the bases of their gradients: found by the first worker, the same on all. Collective."""
        fallbacks, made = 0, list[Tensor]()
        for parameter in due:
            group = self.param_groups[self._places[parameter].group]
            rows, columns = parameter.shape[-2:]
            side, rank = side_of(group["projection"], rows, columns), min(group["rank"], rows, columns)
            if _world() > 1 and dist.get_rank() > 0:
                basis = empty_basis(side, rank, parameter)
            else:
                previous = self._basis(parameter) if self._updates_of(parameter) else None
                found, fell_back = find_basis(_gradient(parameter), side, rank, self._behaviour.refresh, previous)
                fallbacks += fell_back
                basis = found.stored_as(parameter.dtype)
            self.state[parameter] |= basis.tensors()
            made += basis.tensors().values()
        if _world() > 1:
            _broadcast(made)
        if fallbacks:
            self._messages.append(
                f"galore_refresh: subspace fell back to the exact basis for {fallbacks} of {len(due)} matrices"
            )

    def _basis(self, parameter: Tensor) -> Basis:
        state = self.state[parameter]
        return Basis(state.get("left"), state.get("right"))

    def _updates_of(self, parameter: Tensor) -> int:
        return int(self.state[parameter].get("step", 0))

    # ---- layerwise ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _use(self, parameter: Tensor) -> None:
        """Update one parameter in the backward pass and free its gradient (section 4.3 of the paper).

        A gradient that is not finite has no basis: then the parameter is left alone, and whoever asks for the
        gradient's norm learns of it.
        """
        if parameter in self._used:
            raise StrategyError(
                "galore_layerwise needs the whole gradient in one backward pass, and a second one came; write "
                "gradient_accumulation_steps: 1 and raise per_device_train_batch_size, or galore_layerwise: false"
            )
        norm = torch.linalg.vector_norm(_gradient(parameter), dtype=torch.float32)
        self._used[parameter] = norm
        if not self._is_due(parameter) or bool(torch.isfinite(norm)):
            self._apply([parameter])
        parameter.grad = None

    def _use_nothing(self) -> None:
        """Update the parameters that the backward pass has not reached: untouched means zero, as everywhere."""
        for parameter in self._places:
            if parameter.requires_grad and parameter not in self._used:
                parameter.grad = torch.zeros_like(parameter)
                self._use(parameter)

    def gradient_norm(self) -> Tensor | None:
        """Layerwise: the norm of all gradients that were used up; 0 where there was nothing to learn from."""
        if not self._behaviour.layerwise:
            return None
        if not self._used:
            return torch.zeros((), device=next(iter(self._places)).device)
        norms: Tensor = torch.linalg.vector_norm(torch.stack(list(self._used.values())))
        return norms

    # ---- what others see ----------------------------------------------------------------------------------------

    def measurements(self) -> dict[str, float]:
        """`weights_changed`: the share of the weights in half precision that the last update has changed."""
        last = self._last_change
        if not last.entries:
            return {}
        return {"weights_changed": float(torch.stack(last.counts).sum()) / last.entries}

    def messages(self) -> list[str]:
        """Where subspace iteration had to fall back to the exact basis."""
        told, self._messages = self._messages, []
        return told

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, every tensor in its stored number format and strides.

        torch's own would cast fp32 moments to the number format of a bf16 parameter.

        Raises:
            ValueError: it is the state of other parameters.
        """
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the optimizer's parameters are grouped otherwise")
        for group, kept in zip(self.param_groups, saved, strict=True):
            group.update({key: value for key, value in kept.items() if key != "params"})
        by_number = {place.number: parameter for parameter, place in self._places.items()}
        self.state.clear()
        for number, values in state_dict["state"].items():
            parameter = by_number[number]
            self.state[parameter] = {
                name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
        self._used.clear()


def _places(groups: Iterable[Group], *, stagger: bool) -> dict[Tensor, _Place]:
    """The place of every parameter. Staggered refreshes are spread evenly over the interval, in model order."""
    numbered = [(index, p) for index, group in enumerate(groups) for p in group["params"]]
    intervals = [group["update_interval"] if group["rank"] else 0 for group in groups]
    projected = sum(1 for index, _ in numbered if intervals[index])
    places: dict[Tensor, _Place] = {}
    earlier = 0
    for number, (index, parameter) in enumerate(numbered):
        offset = earlier * intervals[index] // projected if stagger and intervals[index] else 0
        earlier += bool(intervals[index])
        places[parameter] = _Place(index, number, offset)
    return places


def _decay(parameters: list[Tensor], part: float) -> None:
    """p <- p - part p."""
    if part:
        torch._foreach_add_(parameters, parameters, alpha=-part)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _pieces(tensors: Iterable[Tensor], entries: int) -> Iterator[list[Tensor]]:
    """Neighbours together as long as they hold at most so many entries; a larger one is alone."""
    piece: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if piece and filled + tensor.numel() > entries:
            yield piece
            piece, filled = [], 0
        piece.append(tensor)
        filled += tensor.numel()
    if piece:
        yield piece


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _broadcast(bases: Iterable[Tensor]) -> None:
    """Overwrite column-major tensors by those of the first worker, in few flat messages. Collective."""
    by_format: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for basis in bases:
        by_format.setdefault((basis.dtype, basis.device), []).append(basis.mT)  # contiguous
    for same in by_format.values():
        for piece in _pieces(same, _BUCKET_ENTRIES):
            flat = torch.cat([basis.reshape(-1) for basis in piece])
            dist.broadcast(flat, src=0)
            for basis, values in zip(piece, flat.split([basis.numel() for basis in piece]), strict=True):
                basis.copy_(values.view_as(basis))
