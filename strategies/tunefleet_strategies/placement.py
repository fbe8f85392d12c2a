"""Where a new adapter goes: `lora_target` and `additional_target` resolved on a model, and what cannot be refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.fields import ALL
from tunefleet_strategies.parts import Anatomy
from tunefleet_strategies.targets import (
    LoraTargets,
    anatomy,
    is_linear,
    last_pieces,
    lora_targets,
    matching,
    unknown_target,
)

if TYPE_CHECKING:
    from tunefleet_strategies.lora import Lora


@dataclass(frozen=True)
class Placement:
    """Where a new adapter's trainable parts go."""

    targets: LoraTargets
    additional: tuple[str, ...]
    """Modules that train whole."""
    tie_head: bool
    """Whether an additional embedding takes the head that shares its matrix along."""


def placement(settings: Lora, model: nn.Module) -> Placement:
    """Resolve `lora_target` and `additional_target` on the model's structure."""
    parts = anatomy(model)
    additional, tie_head = _additional(model, parts, settings.additional_target or ())
    targets = lora_targets(parts, settings.lora_target)
    in_additional = [
        path for path in (*targets.modules, *targets.parameters) if any(_within(path, whole) for whole in additional)
    ]
    if settings.lora_target != (ALL,):
        _check_named(settings, model, parts, targets, in_additional)
    modules = tuple(path for path in targets.modules if path not in in_additional)
    parameters = tuple(path for path in targets.parameters if path not in in_additional)
    if not takes_fused(settings):
        parameters = ()
    if not modules and not parameters:
        raise StrategyError(
            f"lora_target: {type(model).__name__} has nothing left in its layers that can be adapted this way; "
            "name other targets or use finetuning_type: freeze"
        )
    return Placement(LoraTargets(modules, parameters), additional, tie_head)


def takes_fused(settings: Lora) -> bool:
    """Whether PEFT can put these factors beside fused experts: plain LoRA, rsLoRA and LoRA+ without dropout."""
    return not (settings.lora_dropout > 0 or settings.use_dora or settings.pissa_init)


def _check_named(
    settings: Lora, model: nn.Module, parts: Anatomy, targets: LoraTargets, in_additional: Sequence[str]
) -> None:
    """Refuse names that ask for what cannot be: those of `all` are passed over instead."""
    if in_additional:
        raise StrategyError(f"lora_target and additional_target both name {in_additional[0]}; drop it from one of them")
    if targets.parameters and not takes_fused(settings):
        raise StrategyError(
            f"lora_target: {targets.parameters[0]} holds fused experts, which take plain LoRA without dropout only; "
            "set lora_dropout: 0 and leave out use_dora and pissa_init, or name other targets"
        )
    if parts.tied is not None and {parts.tied.embedding, parts.tied.head} & set(targets.modules):
        name = last_pieces([parts.tied.embedding])[0]
        raise StrategyError(
            f"lora_target: `{name}` and the head share one matrix in this model, and factors on one of them would "
            f"part them; name `{name}` in additional_target instead"
        )
    embedded = [path for path in targets.modules if not is_linear(model.get_submodule(path))]
    if settings.pissa_init and embedded:
        raise StrategyError(f"pissa_init: {embedded[0]} is an embedding, which PiSSA does not split; drop it")


def _additional(model: nn.Module, parts: Anatomy, names: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Paths of `additional_target`, and whether the tied head comes along with its embedding.

    Raises:
        StrategyError: a name matches nothing, or would part tied embeddings.
    """
    holders = [path for path, module in model.named_modules() if path and any(True for _ in module.parameters())]
    found: dict[str, None] = {}
    for name in names:
        paths = matching(name, holders)
        if not paths:
            raise unknown_target("additional_target", name, last_pieces(parts.outside), "module")
        found |= dict.fromkeys(paths)
    # A module inside another that trains whole comes along with it.
    outer = [path for path in found if not any(_within(path, whole) for whole in found if whole != path)]
    if parts.tied is None or not {parts.tied.embedding, parts.tied.head} & set(outer):
        return tuple(outer), False
    name = last_pieces([parts.tied.embedding])[0]
    if name not in EMBEDDING_LAYER_NAMES:
        raise StrategyError(
            f"additional_target: `{name}` and the head share one matrix in this model and PEFT cannot keep them "
            f"together; use finetuning_type: freeze with freeze_extra_modules: {name}, or drop it"
        )
    if parts.tied.embedding not in outer:
        raise StrategyError(
            f"additional_target: the head shares its matrix with the embedding in this model; name `{name}` instead, "
            "which trains both"
        )
    return tuple(path for path in outer if path != parts.tied.head), True


def _within(path: str, whole: str) -> bool:
    return path == whole or path.startswith(f"{whole}.")
