"""LoRA adapters on PEFT: made, loaded, merged in a row, and written.

Legend: m rows (outputs), n columns (inputs), r rank; A is (r x n), B is (m x r).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefleet_strategies import pissa
from tunefleet_strategies.contract import AttachContext
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.parts import Tied
from tunefleet_strategies.placement import Placement, placement
from tunefleet_strategies.targets import anatomy, is_linear, matching
from tunefleet_strategies.weights import hold

if TYPE_CHECKING:
    from tunefleet_strategies.lora import Lora

ADAPTER = "default"
"""PEFT's name of the one adapter that a model carries here."""
CHAIN_FILE = "tunefleet_chain.json"


def attach_adapter(settings: Lora, model: nn.Module, context: AttachContext) -> PeftModel:
    """Merge earlier adapters, then continue the last one or make a new one; see `Lora.attach`."""
    if not isinstance(model, PreTrainedModel):
        raise StrategyError(f"{type(model).__name__} is no transformers model, which PEFT needs; load it with them")
    for position, path in enumerate(settings.adapter_name_or_path or ()):
        _check_chain(path, (settings.adapter_name_or_path or ())[:position])
    # PEFT draws start values even for adapters that it then loads, always from the global random state.
    with private_random(context.seed, model.device):
        base = merge_adapters(model, settings.merged)
        if settings.continued is not None:
            adapted = continue_adapter(base, settings.continued)
        else:
            adapted = new_adapter(settings, base, context)
        if settings.pissa_init:
            pissa.split(adapted, settings.pissa_iter, context)
    hold(adapted, context.precision)
    if context.precision.autocast:
        _leave_inputs_alone(adapted)
    return adapted


@contextmanager
def private_random(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seeded random state, and give the global one back untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _leave_inputs_alone(model: PeftModel) -> None:
    """Do not copy every layer input to fp32: autocast brings the fp32 factors to the inputs' format instead.

    PEFT's copy keeps 4 bytes of each input for the backward pass on top of the 2 that the base layer keeps.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # PEFT's documented switch; its annotation only follows from nn.Module's.
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


# --- the chain of earlier adapters -----------------------------------------------------------------------------------


def read_config(path: str) -> LoraConfig:
    """The configuration of an adapter on disk or on the hub.

    Raises:
        StrategyError: there is none, it is no LoRA adapter, or it fits only a residual base that is not saved.
    """
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError) as problem:
        raise StrategyError(
            f"adapter_name_or_path: `{path}` holds no adapter ({type(problem).__name__}); name a folder with an "
            "adapter_config.json"
        ) from problem
    if not isinstance(config, LoraConfig):
        raise StrategyError(f"adapter_name_or_path: `{path}` is a {config.peft_type} adapter; name a LoRA adapter")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith("pissa"):
        raise StrategyError(
            f"adapter_name_or_path: `{path}` holds PiSSA factors that fit only their residual base; name the "
            "converted adapter, which an export leaves in the folder above"
        )
    return config


def merge_adapters(model: PreTrainedModel, paths: Sequence[str]) -> PreTrainedModel:
    """Add adapters to the base weights for good, in order. On meta tensors they are only checked."""
    for path in paths:
        read_config(path)
        if model.device.type == "meta":
            continue
        merged = PeftModel.from_pretrained(model, path, torch_device=str(model.device)).merge_and_unload()
        if not isinstance(merged, PreTrainedModel):
            raise StrategyError(f"adapter_name_or_path: `{path}` cannot be merged; export it to a whole model first")
        model = merged
    return model


def continue_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """Load an adapter so that it trains further. Its own settings rule; on meta tensors only its shapes are built."""
    config = read_config(path)
    if model.device.type == "meta":
        config.inference_mode = False
        return _adapted(model, config)
    loaded = PeftModel.from_pretrained(
        model, path, is_trainable=True, autocast_adapter_dtype=False, torch_device=str(model.device)
    )
    if not isinstance(loaded, PeftModel):
        raise StrategyError(f"adapter_name_or_path: `{path}` cannot be trained further; name a LoRA adapter")
    return loaded


def _recorded_chain(path: str) -> list[str]:
    """The adapters that were merged before an adapter on disk was trained."""
    file = Path(path).expanduser() / CHAIN_FILE
    if not file.is_file():
        return []
    return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))["adapters"]]


def _check_chain(path: str, before: Sequence[str]) -> None:
    """An adapter trained on merged ones fits only where as many stand before it (folders may have moved)."""
    chain = _recorded_chain(path)
    if len(chain) > 0 and len(chain) != len(before):
        raise StrategyError(
            f"adapter_name_or_path: `{path}` was trained on its base plus {', '.join(chain)}; "
            f"write {','.join([*chain, path])}"
        )


def write_chain(model: PeftModel, folder: Path, merged: Sequence[str]) -> None:
    """Record base and merged adapters beside an adapter that fits only both together."""
    if not merged:
        return
    chain = {"base": model.get_base_model().name_or_path, "adapters": list(merged)}
    (folder / CHAIN_FILE).write_text(json.dumps(chain, indent=2) + "\n", encoding="utf-8")


# --- a new adapter ---------------------------------------------------------------------------------------------------


def new_adapter(settings: Lora, model: PreTrainedModel, context: AttachContext) -> PeftModel:
    """Put fresh factors beside the targets (B = 0, so the model computes what it did).

    Raises:
        StrategyError: a target matches nothing, or cannot be adapted in the way asked.
    """
    place = placement(settings, model)
    copied = [p for path in place.additional for p in model.get_submodule(path).parameters()]
    with context.gather(copied):
        adapted = _adapted(model, _config(settings, model, place))
    _check_placed(adapted, place)
    return adapted


def _adapted(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    tied = anatomy(model).tied if config.ensure_weight_tying else None
    planned = model.device.type == "meta"
    try:
        # A plan draws no start values, and takes no memory: PEFT alone makes them on the CPU before it lets them go.
        with model.device if planned else nullcontext():
            adapted = get_peft_model(
                model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=planned
            )
    except (TypeError, ValueError) as problem:
        raise StrategyError(
            f"PEFT cannot put this adapter on {type(model).__name__} ({problem}); name other targets"
        ) from problem
    if not isinstance(adapted, PeftModel):
        raise StrategyError("PEFT made a mixed model out of a LoRA configuration; pass a plain transformers model")
    if tied is not None:
        _tie_copies(adapted, tied)
    return adapted


def _tie_copies(model: PeftModel, tied: Tied) -> None:
    """Let the copies of tied modules that train share their matrix too; on meta tensors PEFT parts them."""
    wrappers = dict(tuner_modules(model))
    embedding, head = wrappers[tied.embedding], wrappers[tied.head]
    if isinstance(embedding, ModulesToSaveWrapper) and isinstance(head, ModulesToSaveWrapper):
        shared = embedding.modules_to_save[ADAPTER].get_parameter("weight")
        head.modules_to_save[ADAPTER].register_parameter("weight", shared)


def _config(settings: Lora, model: PreTrainedModel, place: Placement) -> LoraConfig:
    """PEFT's configuration, in short names where they mean the same as the whole paths."""
    modules = [path for path, _ in model.named_modules()]
    parameters = [path for path, _ in model.named_parameters()]
    linear_kinds = [model.get_submodule(path) for path in place.targets.modules]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.lora_dropout,
        # An empty list, not None: None would let PEFT fill in a default of its own.
        target_modules=short_names(place.targets.modules, 1, modules),
        target_parameters=short_names(place.targets.parameters, 2, parameters) or None,
        modules_to_save=list(place.additional) or None,
        ensure_weight_tying=place.tie_head,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        # GPT-2's Conv1D stores its matrix as (inputs x outputs).
        fan_in_fan_out=any(is_linear(module) and not isinstance(module, nn.Linear) for module in linear_kinds),
    )


def short_names(paths: Sequence[str], pieces: int, everything: Sequence[str]) -> list[str]:
    """The last pieces of paths where they match nothing else in the model, else the paths themselves.

    Short names keep an adapter usable where a model sits inside another one.
    """
    short = list(dict.fromkeys(".".join(path.split(".")[-pieces:]) for path in paths))
    matched = {path for name in short for path in matching(name, everything)}
    return short if matched == set(paths) else list(paths)


def _check_placed(model: PeftModel, place: Placement) -> None:
    """PEFT matches some names by their endings; what it adapted must be what was asked for."""
    layers = {path for path, module in adapter_layers(model) if not isinstance(module, ParamWrapper)}
    expected = set(place.targets.modules)
    if layers != expected:
        odd = sorted(layers ^ expected)[0]
        raise StrategyError(f"lora_target: PEFT did not adapt exactly the targets ({odd}); name whole module paths")
    wrapped = {path for path, module in tuner_modules(model) if isinstance(module, AuxiliaryTrainingWrapper)}
    if not wrapped >= set(place.additional) or len(wrapped) != len(place.additional) + place.tie_head:
        odd = sorted(wrapped ^ set(place.additional))[0]
        raise StrategyError(
            f"additional_target: PEFT matched other modules than were named ({odd}); name other modules"
        )


# --- an adapted model ------------------------------------------------------------------------------------------------


def tuner_modules(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base by its path there; what stands in an adapter is not entered."""
    return _walk("", model.get_base_model())


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        for name, child in module.named_children():
            yield from _walk(f"{path}.{name}".lstrip("."), child)


def base_modules(model: PeftModel) -> list[tuple[str, nn.Module]]:
    """The modules of the base model by path, as if no adapter stood around any of them."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in tuner_modules(model):
        if isinstance(module, BaseTunerLayer):
            found.append((path, module.get_base_layer()))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found.append((path, module.original_module))
        else:
            found.append((path, module))
    return found


def adapter_layers(model: PeftModel) -> list[tuple[str, LoraLayer]]:
    """The layers that carry factors, by their paths in the base model."""
    return [(path, module) for path, module in tuner_modules(model) if isinstance(module, LoraLayer)]


def bare_name(name: str) -> str:
    """What a parameter of an adapted model is called in the base, if it is one of the base's or a copy of one."""
    for wrapping in ("base_model.model.", "base_layer.", "original_module.", f"modules_to_save.{ADAPTER}."):
        name = name.replace(wrapping, "")
    return name


@torch.no_grad()
def measure_magnitudes(model: PeftModel, weight: Callable[[str], Tensor]) -> None:
    """Compute DoRA's magnitudes where the base weights were nan, one base weight at a time.

    Args:
        weight: reads one weight of the base whole, by its name there.
    """
    for path, layer in adapter_layers(model):
        if ADAPTER not in layer.lora_magnitude_vector:
            continue
        magnitude = layer.lora_magnitude_vector[ADAPTER]
        assert isinstance(magnitude, DoraLinearLayer)
        if not torch.isnan(magnitude.weight).any():  # a loaded adapter brings its own
            continue
        held = layer.get_base_layer().get_parameter("weight")
        absent, held.data = held.data, weight(f"{path}.weight").to(held.dtype)
        if ADAPTER in layer.lora_A:
            a, b = layer.lora_A[ADAPTER].get_parameter("weight"), layer.lora_B[ADAPTER].get_parameter("weight")
        else:
            a, b = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
        magnitude.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=layer.scaling[ADAPTER])
        held.data = absent


def adapter_config(model: PeftModel) -> LoraConfig:
    """The configuration of the adapter that trains."""
    config = model.peft_config[ADAPTER]
    if not isinstance(config, LoraConfig):
        raise StrategyError(f"the model carries a {config.peft_type} adapter; attach LoRA to a plain model")
    return config


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT format, naming the base that it fits."""
    # False, not "auto": "auto" asks the hub for the base's configuration to see whether its vocabulary grew.
    model.save_pretrained(str(folder), save_embedding_layers=False)
