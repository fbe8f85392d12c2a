"""AdamW that trains one part of the parameters for K updates, then another part, each time with fresh moments.

What both modes of BAdam share: the count of applied updates decides what is active, the state lives for one visit only,
and all of it goes into `state_dict` by the names of parameters, in the number formats that it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunefleet_strategies.contract import MethodOptimizer, OptimizerSpec
from tunefleet_strategies.optim.block_schedule import NEVER, START, Origin, updates_in_visit, visit_of
from tunefleet_strategies.optim.groups import Group

Setting = int | float | str | None


class VisitingAdamW(MethodOptimizer, ABC):
    """Counts updates, ends visits, saves and loads. A subclass says what is active and how it changes.

    `param_groups` hold every parameter that some visit trains, so that learning-rate schedules see them all. `state`
    holds what the present visit has touched: `exp_avg`, `exp_avg_sq` and, beside bf16 weights, `master`.
    """

    def __init__(
        self,
        groups: list[Group],
        parameters: Mapping[str, nn.Parameter],
        spec: OptimizerSpec,
        *,
        interval: int,
        settings: Mapping[str, Setting],
        verbose: int,
    ) -> None:
        """
        Args:
            parameters: everything in `groups`, by name.
            interval: updates of a visit, or `NEVER`.
            settings: what else decides which part is active when; a saved state goes with these only.
            verbose: 0 says nothing, 1 what each visit trains, 2 down to its parameters.
        """
        defaults = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
        super().__init__(groups, defaults)
        self.updates = 0
        """Updates applied."""
        self.interval = interval
        self._origin = START
        self.verbose = verbose
        self._parameters = dict(parameters)
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._settings: dict[str, Setting] = {**settings, "interval": interval}
        self._unsaid: list[str] = []
        self._announced = False

    @property
    def visit(self) -> int:
        """The number of the visit that the next update belongs to, from 0."""
        return visit_of(self.updates, self.interval, self._origin)

    @property
    def _in_visit(self) -> int:
        """Updates of that visit that are applied."""
        return updates_in_visit(self.updates, self.interval, self._origin)

    @abstractmethod
    def _activate(self) -> None:
        """Make ready for the visit that the next update belongs to. Called at its beginning and after loading."""

    @abstractmethod
    def _update(self, group: Group, step: int) -> None:
        """Change what is active in a parameter group; `step` is the number of this update in its visit, from 1."""

    @abstractmethod
    def _about_visit(self) -> str:
        """What the present visit trains; with `verbose` 2 by parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one update. Where it is the last of its visit, the state goes and the next part becomes active."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._announce()
        in_visit = self._in_visit
        for group in self.param_groups:
            self._update(group, in_visit + 1)
        self._count()
        return loss

    def _count(self) -> bool:
        """Count an update; whether it was the last of its visit, and the next part has become active."""
        self.updates += 1
        ended = self._in_visit == 0
        if ended:
            self._begin_visit()
        return ended

    def _begin_visit(self) -> None:
        self.state.clear()
        self._activate()
        self._announced = False

    def _announce(self) -> None:
        """Say what the visit trains, once, with its first update (or the first after loading)."""
        if self._announced or not self.verbose:
            return
        first = self.updates - self._in_visit + 1
        span = (
            f"From update {first} on" if self.interval == NEVER else f"Updates {first} to {first + self.interval - 1}"
        )
        self._unsaid.append(f"{span}: {self._about_visit()}.")
        self._announced = True

    def messages(self) -> list[str]:
        """One sentence for each visit whose first update came since the last call."""
        said, self._unsaid = self._unsaid, []
        return said

    def _moments(self, parameter: nn.Parameter, active: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The state of a parameter, made at its first update of a visit.

        Args:
            active: the entries of the weight that the visit trains. The master copy starts from them, so what an
                earlier visit has rounded away stays away (as in the paper and in badam).
        """
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            start = active()
            state["exp_avg"] = torch.zeros_like(start, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(start, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["master"] = start.float()
        return state

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers: updates applied, where visits are counted from, the visit's state and the groups.

        Parameters stand under their names.
        """
        groups = [
            {**group, "params": [self._names[parameter] for parameter in group["params"]]}
            for group in self.param_groups
        ]
        state = {name: dict(self.state[p]) for name, p in self._parameters.items() if p in self.state}
        return {
            "updates": self.updates,
            "origin": [self._origin.updates, self._origin.visit],
            "settings": dict(self._settings),
            "state": state,
            "param_groups": groups,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken.

        torch's own would cast fp32 masters and moments to the format of bf16 weights; here formats and strides stay.

        Raises:
            ValueError: the state was saved under other settings or for other parameters.
        """
        if state_dict["settings"] != self._settings:
            raise ValueError(f"its optimizer was saved under {state_dict['settings']}, and this is {self._settings}")
        saved = [group["params"] for group in state_dict["param_groups"]]
        if saved != [[self._names[parameter] for parameter in group["params"]] for group in self.param_groups]:
            raise ValueError("its optimizer trains other parameters")
        for group, stored in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in stored.items() if key != "params"})
        self.updates, self._origin = state_dict["updates"], Origin(*state_dict["origin"])
        self._unsaid.clear()
        self._begin_visit()
        for name, tensors in state_dict["state"].items():
            parameter = self._parameters[name]
            self.state[parameter] = {key: t.to(parameter.device, copy=True) for key, t in tensors.items()}
