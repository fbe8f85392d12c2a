"""What a person should know of a LoRA run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper

from tunefleet_strategies.adapters import adapter_config, adapter_layers, base_modules, tuner_modules
from tunefleet_strategies.fields import ALL
from tunefleet_strategies.parts import Anatomy
from tunefleet_strategies.placement import takes_fused
from tunefleet_strategies.targets import anatomy, lora_targets, matching
from tunefleet_strategies.weights import low_precision_notices

if TYPE_CHECKING:
    from tunefleet_strategies.lora import Lora


def lora_notices(settings: Lora, model: PeftModel) -> list[str]:
    """All notices, the surprising ones last; see `Lora.notices`."""
    parts = anatomy(model.get_base_model(), base_modules(model))
    found = low_precision_notices(model)
    found += _scale(settings, model)
    if settings.pissa_init and settings.lora_dropout > 0:
        found.append(
            "pissa_init with lora_dropout > 0 drops a share of the principal part of the weights in training; "
            "the converted adapter is not affected"
        )
    found += _left_out(settings, model, parts)
    if settings.continued is not None:
        found += _overruled(settings, model, parts)
    return found


def _scale(settings: Lora, model: PeftModel) -> list[str]:
    config = adapter_config(model)
    if not config.use_rslora:
        return []
    scale = config.lora_alpha / config.r**0.5
    text = f"use_rslora scales by alpha / sqrt(rank) = {config.lora_alpha} / sqrt({config.r}) = {scale:.4g}"
    if settings.continued is None and not settings.lora_alpha:
        text += "; lora_alpha is unset, so this is 2 sqrt(rank) and grows with the rank; set lora_alpha to fix it"
    return [text]


def _left_out(settings: Lora, model: PeftModel, parts: Anatomy) -> list[str]:
    """Fused experts that `all` passes over."""
    adapted = any(isinstance(module, ParamWrapper) for _, module in adapter_layers(model))
    if not parts.fused or adapted or settings.lora_target != (ALL,):
        return []
    why = "" if takes_fused(settings) else " (they take plain LoRA without lora_dropout, use_dora and pissa_init only)"
    return [f"the {len(parts.fused)} fused expert tensors of this model are not adapted, only its linear layers{why}"]


def _overruled(settings: Lora, model: PeftModel, parts: Anatomy) -> list[str]:
    """Settings of the recipe that differ from those of the adapter that is trained further."""
    config = adapter_config(model)
    pairs = {
        "lora_rank": (settings.lora_rank, config.r),
        "lora_alpha": (settings.alpha, config.lora_alpha),
        "lora_dropout": (settings.lora_dropout, config.lora_dropout),
        "use_rslora": (settings.use_rslora, config.use_rslora),
        "use_dora": (settings.use_dora, config.use_dora),
    }
    differing = [f"{key} {asked} (adapter: {own})" for key, (asked, own) in pairs.items() if asked != own]
    adapted = {path for path, module in adapter_layers(model) if not isinstance(module, ParamWrapper)}
    if adapted != set(lora_targets(parts, settings.lora_target).modules):
        differing.append(f"lora_target {','.join(settings.lora_target)} (adapter: {_names(config.target_modules)})")
    whole = [path for path, module in tuner_modules(model) if isinstance(module, AuxiliaryTrainingWrapper)]
    asked_whole = settings.additional_target or ()
    if any(not matching(name, whole) for name in asked_whole) or bool(asked_whole) != bool(whole):
        differing.append(f"additional_target {','.join(asked_whole) or None} (adapter: {_names(whole)})")
    if not differing:
        return []
    return [
        f"the continued adapter {settings.continued} keeps its own settings, not those written: {'; '.join(differing)}"
    ]


def _names(names: object) -> str:
    return ",".join(sorted(str(name) for name in names)) if isinstance(names, (list, set, tuple)) else str(names)
