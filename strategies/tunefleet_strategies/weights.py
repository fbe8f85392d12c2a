"""Number formats of weights, and whole models on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from tunefleet_strategies.contract import Precision
from tunefleet_strategies.errors import StrategyError


def hold(model: nn.Module, precision: Precision) -> None:
    """Put what trains into the trainable number format and the rest into the frozen one, in place.

    Buffers keep their format: rotary frequencies lose positions in bf16.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(precision.trainable if parameter.requires_grad else precision.frozen)


def trained_dtype(model: nn.Module) -> torch.dtype:
    """The number format of what trains.

    Raises:
        StrategyError: nothing trains.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            return parameter.dtype
    raise StrategyError("no parameter of the model is trainable; attach a method first")


def low_precision_notices(model: nn.Module, *, moments: bool = True) -> list[str]:
    """A notice when what trains is held in bf16 alone.

    Args:
        moments: whether those of AdamW are in bf16 as well, as torch keeps them beside bf16 weights.
    """
    if trained_dtype(model) != torch.bfloat16:
        return []
    too = " (and AdamW's moments are bf16 too, where slow changes of the second one round away)" if moments else ""
    return [
        f"weights that train are held in bf16 without an fp32 copy{too}, so updates below about 1/512 of a weight "
        "round away; use bf16: true instead of pure_bf16: true to keep them"
    ]


def save_whole_model(model: nn.Module, folder: Path) -> None:
    """Write a model as `transformers` loads it, every weight in the number format of what trained.

    Raises:
        StrategyError: the model cannot write itself in Hugging Face format.
    """
    # Imported here because reading a recipe needs this module but no model, and transformers loads for seconds.
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise StrategyError(f"{type(model).__name__} is no transformers model, so it has no format on disk; save it")
    dtype = trained_dtype(model)
    state: dict[str, Tensor] = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=state)
    _name_dtype(folder / "config.json", dtype)


def _name_dtype(config: Path, dtype: torch.dtype) -> None:
    """Let the written configuration name the written format.

    `save_pretrained` names the format of the model's first parameter, which under freeze tuning is a frozen one.
    """
    keys = json.loads(config.read_text(encoding="utf-8"))
    keys["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")
