"""Models and tokenizers from a local folder or a hub name, and a model's shape without its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunefleet.errors import Refused
from tunefleet.model_settings import ModelSettings
from tunefleet_strategies.contract import ModelShape, ParameterShape
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.parts import Anatomy
from tunefleet_strategies.targets import anatomy

_T = TypeVar("_T")

_ATTENTION = {"auto": None, "sdpa": "sdpa", "disabled": "eager", "fa2": "flash_attention_2"}
"""`auto` leaves the choice to transformers: some architectures (Gemma 2) have no sdpa of their own."""


_kept: dict[ModelSettings, tuple[PreTrainedTokenizerBase, PreTrainedModel]] = {}
"""What `keep` has loaded. A process takes it out, as what it does with a model changes that."""


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever wraps it (PEFT), adapters included."""
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    assert isinstance(base, PreTrainedModel)
    return base


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        Refused: there is none, or its code may not run.
    """
    if settings in _kept:
        return _kept[settings][0]
    return _from(
        settings,
        "tokenizer",
        lambda name: AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code),
    )


def keep(settings: ModelSettings) -> None:
    """Load model and tokenizer now, for the calls of `load_model` and `load_tokenizer` in forks of this process.

    Weights are memory-mapped, so all processes of a machine share them, and a fork copies only the pages that it
    changes.

    Raises:
        Refused: as `load_model`.
    """
    _kept[settings] = load_tokenizer(settings), load_model(settings)


def check_weights(settings: ModelSettings) -> None:
    """See that a local folder holds whole weights, without reading them. Names on the hub are not asked about.

    Raises:
        Refused: weights are missing or cut off.
    """
    folder = Path(settings.model_name_or_path).expanduser()
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise Refused(
            f"model_name_or_path {folder} holds no weights (*.safetensors): copy them there, or name another folder."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise Refused(f"The weights in {file} are damaged ({error}): copy or download them again.") from error


def load_model(
    settings: ModelSettings, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The causal language model with its weights. Callers pass `use_cache=False` to its forward.

    Args:
        dtype: what the weights are loaded as; None keeps the checkpoint's own. `precision.cast` decides the rest after
            the strategy has said what trains, so loading an fp32 checkpoint as bf16 would round what trains.

    Raises:
        Refused: it is missing or damaged, no causal language model, or its code may not run.
    """
    if dtype is None and settings in _kept:
        return nn.Module.to(_kept.pop(settings)[1], device)
    model = _from(
        settings,
        "model",
        lambda name: AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=settings.trust_remote_code,
            attn_implementation=_ATTENTION[settings.flash_attn],
        ),
    )
    assert isinstance(model, PreTrainedModel)
    return cast(PreTrainedModel, nn.Module.to(model, device))


def meta_model(settings: ModelSettings) -> PreTrainedModel:
    """The same architecture on the meta device: shapes and names, no weights, none read.

    Raises:
        Refused: as `load_model`.
    """
    config = _from(
        settings,
        "model",
        lambda name: AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code),
    )
    with torch.device("meta"):
        model = _from(
            settings,
            "model",
            lambda _: cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=settings.trust_remote_code),
        )
    model.tie_weights()
    assert isinstance(model, PreTrainedModel)
    return model


def empty_model(settings: ModelSettings, dtype: Callable[[torch.dtype | None], torch.dtype]) -> PreTrainedModel:
    """What `load_model` returns but for its weights: parameters on the meta device, buffers as they are computed.

    Args:
        dtype: the number format of the weights, given the one that the configuration names.

    Raises:
        Refused: as `load_model`.
    """
    trust, attention = settings.trust_remote_code, _ATTENTION[settings.flash_attn]
    config = _from(settings, "model", lambda name: AutoConfig.from_pretrained(name, trust_remote_code=trust))
    chosen = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        model = _from(
            settings,
            "model",
            lambda _: cast(Any, AutoModelForCausalLM).from_config(
                config, dtype=dtype(config.dtype), trust_remote_code=trust, **chosen
            ),
        )
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()
    if model.can_generate():
        with suppress(OSError):  # most models on the hub bring one, others take it from their configuration
            model.generation_config = GenerationConfig.from_pretrained(str(model.name_or_path))
    model.eval()
    return model


def model_shape(model: nn.Module) -> ModelShape:
    """Names and shapes of a model, its method attached or not; tied parameters count once."""
    base = causal_lm(model)
    config = base.config.get_text_config()
    parameters = tuple(ParameterShape(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())
    return ModelShape(
        architecture=type(base).__name__,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        parameters=parameters,
        anatomy=_anatomy(model) if base is model else None,
    )


def _anatomy(model: nn.Module) -> Anatomy | None:
    try:
        return anatomy(model)
    except StrategyError:  # no list of layers; methods that need one have refused the model in `attach`
        return None


def expert_share(model: nn.Module) -> float:
    """The part of a mixture's experts that serves one token; 1 for a dense model (see `training.flops`)."""
    config = causal_lm(model).config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0


def _from(settings: ModelSettings, what: str, read: Callable[[str], _T]) -> _T:
    name = settings.model_name_or_path
    local = Path(name).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise Refused(f"model_name_or_path {name} holds no config.json: name a folder that transformers wrote.")
        name = str(local)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Refused(f"model_name_or_path {name} is no folder on this machine: correct the path.")
    try:
        return read(name)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        if "trust_remote_code" in str(error):
            mend = "write trust_remote_code: true if you trust it"
        else:
            mend = "correct model_name_or_path, or make the model available here"
        raise Refused(f"The {what} of {settings.model_name_or_path} cannot be loaded ({reason}): {mend}.") from error
