"""BAdam, ratio mode: AdamW on a moving part of the entries of every parameter.

Legend: n entries of a parameter, k of them active, o where their window begins; K updates of a visit, t the number of
an update in its visit. "Flat" is the parameter as one row of n.

Active are the entries [o, o + k) mod n of the flat parameter (`adjacent`), or those that one fixed permutation of it
has there (`scatter`), with k = int(n * ratio), at least 1. After K updates o moves on by k, and moments and bias
correction start again, so o and t follow from the number of applied updates. Gradients stay dense (n).

Update (badam 1.4): p <- p - lr m / (sqrt(v) + eps) sqrt(1 - b2^t) / (1 - b1^t), with an epsilon that the bias
correction does not scale: torch's AdamW with eps_t = eps / sqrt(1 - b2^t). Decay comes first, on active entries only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim.draws import generator_of
from tunefleet_strategies.optim.fused_adamw import Operands, fused_adamw
from tunefleet_strategies.optim.groups import Group
from tunefleet_strategies.optim.visits import VisitingAdamW

MaskMode = Literal["adjacent", "scatter"]

WHOLE_BELOW = 100
"""Parameters with fewer entries than this are trained whole: masking a norm saves nothing."""


def active_entries(entries: int, ratio: float) -> int:
    """k: how many of a parameter's entries train at a time."""
    return entries if entries < WHOLE_BELOW else max(1, int(entries * ratio))


@dataclass(frozen=True)
class Window:
    """The active entries of one flat parameter."""

    pieces: tuple[slice, ...]
    """One stretch, or two where the window wraps around."""
    index: Tensor | None = None
    """scatter: the entries' places in the flat parameter, (k,) int32; None: the pieces are the places."""

    def take(self, flat: Tensor) -> Tensor:
        """A copy of the active entries."""
        if self.index is not None:
            return flat.index_select(0, self.index)  # (n,) -> (k,)
        return torch.cat([flat[piece] for piece in self.pieces])  # (n,) -> (k,)

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Write the active entries back."""
        if self.index is not None:
            flat.index_copy_(0, self.index.long(), values.to(flat.dtype))
            return
        lengths = [piece.stop - piece.start for piece in self.pieces]
        for piece, part in zip(self.pieces, values.split(lengths), strict=True):
            flat[piece] = part


class RatioAdamW(VisitingAdamW):
    """AdamW on `ratio` of the entries of every parameter, which move on after each visit. One worker only."""

    def __init__(
        self,
        groups: list[Group],
        parameters: Mapping[str, nn.Parameter],
        spec: OptimizerSpec,
        *,
        ratio: float,
        interval: int,
        mask_mode: MaskMode,
        verbose: int = 0,
    ) -> None:
        """
        Raises:
            StrategyError: there are several workers.
        """
        refuse_several_workers()
        self.ratio = ratio
        self.mask_mode = mask_mode
        self._seed = spec.seed
        self._windows: dict[nn.Parameter, Window] = {}
        settings = {"ratio": ratio, "mask_mode": mask_mode, "seed": spec.seed}
        super().__init__(groups, parameters, spec, interval=interval, settings=settings, verbose=verbose)
        self._begin_visit()

    def permutation_key(self, name: str) -> tuple[int | str, ...]:
        """What the one permutation of a parameter is drawn by (`draws.seed_of`)."""
        return (self._seed, "permutation", name)

    def _activate(self) -> None:
        self._windows.clear()  # they are laid when they are first looked through

    def window(self, parameter: nn.Parameter) -> Window:
        """The entries of a parameter that the present visit trains."""
        if parameter not in self._windows:
            self._windows[parameter] = self._lay(parameter)
        return self._windows[parameter]

    def _lay(self, parameter: nn.Parameter) -> Window:
        entries = parameter.numel()
        active = active_entries(entries, self.ratio)
        begin = self.visit * active % entries
        end = begin + active
        pieces: tuple[slice, ...] = (slice(begin, min(end, entries)),)
        if end > entries:
            pieces = (*pieces, slice(0, end - entries))
        if self.mask_mode == "adjacent" or active == entries:
            return Window(pieces)
        # Drawn again at every visit rather than kept: 4 n bytes for a moment instead of for the whole run.
        key = self.permutation_key(self._names[parameter])
        order = torch.randperm(entries, generator=generator_of(*key), dtype=torch.int32)  # (n,)
        return Window(pieces, Window(pieces).take(order).to(parameter.device))  # (k,)

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient of the active entries, the only ones that are used."""
        active = [
            self.window(p).take(p.grad.reshape(-1)) for p in self._parameters.values() if p.grad is not None
        ]  # (k,) each
        if not active:
            return torch.zeros((), device=next(iter(self._parameters.values())).device)
        norms = torch._foreach_norm(active, 2, dtype=torch.float32)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def _update(self, group: Group, step: int) -> None:
        parameters: list[nn.Parameter] = group["params"]
        operands = Operands()
        for parameter in parameters:
            window, flat = self.window(parameter), parameter.detach().view(-1)  # (n,)
            state = self._moments(parameter, partial(window.take, flat))
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # untouched = zero
            active = window.take(gradient.reshape(-1)).float()  # (k,)
            values = state["master"] if "master" in state else window.take(flat)
            operands.append(values, active, state["exp_avg"], state["exp_avg_sq"])
        fused_adamw(
            operands,
            step=step,
            learning_rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"] / math.sqrt(1.0 - group["betas"][1] ** step),
            weight_decay=group["weight_decay"],
        )
        for parameter, values in zip(parameters, operands.values, strict=True):
            self.window(parameter).put(parameter.detach().view(-1), values)

    def _about_visit(self) -> str:
        text = f"badam trains {self.ratio:.4g} of the entries of every parameter, visit "
        text += str(self.visit)
        if self.verbose < 2:
            return text
        spans = [
            f"{name} {' and '.join(f'{piece.start}:{piece.stop}' for piece in self.window(parameter).pieces)}"
            for name, parameter in self._parameters.items()
        ]
        return f"{text}: {', '.join(spans)}"


def refuse_several_workers() -> None:
    """A world of one has a process group as well, so it is the size that tells.

    Raises:
        StrategyError: there are several workers.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() != 1:
        raise StrategyError(
            f"badam_mode: ratio trains on one worker, but there are {dist.get_world_size()}; "
            "write ray_num_workers: 1, or badam_mode: layer"
        )
