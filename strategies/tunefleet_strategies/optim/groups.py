"""Parameter groups: one decay rule for every method, and an order that never changes.

Norms, biases and other vectors are never decayed (Loshchilov & Hutter, arXiv 1711.05101, decay weights; a vector has
no direction to shrink). What a parameter is follows from the module that holds it and from its shape, never from a
substring of its path, so RMSNorm classes of every architecture count as norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.errors import StrategyError

Group = dict[str, Any]


@dataclass(frozen=True)
class Owned:
    """A trainable parameter together with the module that holds it."""

    path: str
    attribute: str
    """The parameter's own name inside its module, such as `weight`."""
    module: nn.Module
    parameter: Tensor


@dataclass(frozen=True)
class Rate:
    """The learning rate of a named group of parameters."""

    group: str
    learning_rate: float


def trainable(model: nn.Module) -> Iterator[Owned]:
    """Every trainable parameter once (tied ones at their first place), in module order."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Owned(f"{path}.{attribute}".lstrip("."), attribute, module, parameter)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's own classes, and the RMSNorm class that each architecture brings."""
    own = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, own) or type(module).__name__.endswith("Norm")


def decays(owned: Owned) -> bool:
    """Whether weight decay touches a parameter: matrices do, vectors, norms and biases do not.

    The bias of fused experts is a matrix by shape (one row for each expert), so biases are told by attribute too.
    """
    is_bias = owned.attribute == "bias" or owned.attribute.endswith("_bias")
    return owned.parameter.ndim >= 2 and not is_bias and not is_norm(owned.module)


def grouped(
    parameters: Iterable[Owned], spec: OptimizerSpec, rate: Callable[[Owned], Rate] | None = None
) -> list[Group]:
    """Sort parameters into groups of one learning rate and one decay each.

    Groups stand in order of their first parameter, and parameters keep the order they came in: the order in which the
    optimizer numbers its state. Empty groups are left out.

    Raises:
        StrategyError: there is nothing to train.
    """
    base = Rate("base", spec.learning_rate)
    groups: dict[tuple[str, bool], Group] = {}
    members: dict[tuple[str, bool], list[Tensor]] = {}
    for owned in parameters:
        chosen = base if rate is None else rate(owned)
        key = (chosen.group, decays(owned))
        if key not in groups:
            members[key] = []
            groups[key] = {
                "params": members[key],
                "lr": chosen.learning_rate,
                "weight_decay": spec.weight_decay if key[1] else 0.0,
                "name": chosen.group if key[1] else f"{chosen.group}_nodecay",
            }
        members[key].append(owned.parameter)
    if not groups:
        raise StrategyError("no parameter of the model is trainable; choose targets that exist in it")
    return list(groups.values())
