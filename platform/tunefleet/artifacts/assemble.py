"""A model out of what lies in a trained folder: the base found, the adapters checked and merged in their order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tunefleet.errors import Refused
from tunefleet.model_settings import ModelSettings

if TYPE_CHECKING:
    from peft import LoraModel, PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
CHAIN = "tunefleet_chain.json"
"""Beside an adapter that fits its base only after others were merged: {"base": name, "adapters": [folder, ...]}."""


@dataclass(frozen=True)
class Parts:
    """What a trained folder is made of."""

    folder: Path
    base: str
    """A folder on this machine, or a hub name. The folder itself where it holds a whole model."""
    adapters: tuple[str, ...]
    """To be merged in this order; none for a whole model."""

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is: the trained folder, which carries the chat template, else the base."""
        own = any((self.folder / name).is_file() for name in TOKENIZER_FILES)
        return str(self.folder) if own else self.base


def find_parts(folder: Path, base: str | None) -> Parts:
    """Read what a trained folder says of itself.

    Args:
        base: the base model, where the adapter's own word is not to be followed.

    Raises:
        Refused: the folder is no model, or its base or an earlier adapter is missing.
    """
    folder = folder.expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter_parts(folder, base)
    if (folder / MODEL_CONFIG).is_file():
        if base is not None:
            raise Refused(f"{folder} holds a whole model, which needs no base: leave base out.")
        return Parts(folder, str(folder), ())
    raise Refused(f"{folder} holds neither {ADAPTER_CONFIG} nor {MODEL_CONFIG}: name the output_dir of a finished run.")


def _adapter_parts(folder: Path, base: str | None) -> Parts:
    named = _read(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    chain = _read(folder / CHAIN) if (folder / CHAIN).is_file() else {}
    earlier = chain.get("adapters", [])
    if not isinstance(earlier, list):
        raise Refused(f"{folder / CHAIN} lists no adapters: restore it from the run's model folder.")
    name = base or chain.get("base") or named
    if not name:
        raise Refused(f"The adapter {folder} does not say its base: name it with base.")
    found = _locate(str(name), folder, f"The base model {name} of the adapter {folder}", "name it with base")
    what, mend = "The adapter {} that was merged before {}", "put it back, it is part of the model"
    adapters = [_locate(str(one), folder, what.format(one, folder), mend) for one in earlier]
    return Parts(folder, found, (*adapters, str(folder)))


def _read(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(f"{file} is no JSON ({error}): restore it from the run's model folder.") from error
    if not isinstance(content, dict):
        raise Refused(f"{file} holds no mapping: restore it from the run's model folder.")
    return content


def _locate(name: str, folder: Path, what: str, mend: str) -> str:
    """A path from the current folder, else from the adapter's; what cannot be a path is a hub name."""
    for candidate in (Path(name).expanduser(), folder / name):
        if candidate.is_dir():
            return str(candidate)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Refused(f"{what} is not on this machine: {mend}.")
    return name


def load_parts(parts: Parts) -> PreTrainedModel:
    """The model of a trained folder with every adapter merged, in the base's stored number format, on the CPU.

    Raises:
        Refused: a part cannot be loaded, or an adapter does not fit.
    """
    from tunefleet.models import load_model

    try:
        model = load_model(ModelSettings.model_validate({"model_name_or_path": parts.base}))
    except Refused as refusal:
        if not parts.adapters:
            raise
        mend = "name the base that the adapter was trained on with base"
        raise Refused(f"The base of {parts.folder} cannot be loaded ({str(refusal).rstrip('.')}): {mend}.") from refusal
    for adapter in parts.adapters:
        model = merge(model, adapter)
    model.eval()
    return model


def load_parts_tokenizer(parts: Parts) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template that the model was tuned with.

    Raises:
        Refused: there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise Refused(f"{parts.tokenizer} holds no tokenizer ({reason}): put the base's tokenizer there.") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def merge(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Add an adapter to the weights for good. Sums run in fp32 and are rounded once, to the weight's own format.

    Where the adapter changes only one of two tied embeddings, the model is untied.

    Raises:
        Refused: the adapter is damaged, or was made for another architecture or size.
    """
    read, written = model.get_input_embeddings(), model.get_output_embeddings()
    tied = _is_tied(read, written)
    adapted = _adapted(model, adapter)
    if tied:
        _untie(written)  # a merge into the one matrix must not reach the other's use of it
    _merge_layers(adapted.modules())
    merged = cast("PreTrainedModel", cast("LoraModel", adapted.base_model).unload())
    if tied:
        _tie_again_if_equal(merged)
    return merged


def _adapted(model: PreTrainedModel, adapter: str) -> PeftModel:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    try:
        _refuse_residual(adapter)
        adapted = PeftModel.from_pretrained(model, adapter, torch_device=str(model.device))
        saved = load_peft_weights(adapter, device="cpu")
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = f"{type(model).__name__}: {' '.join(str(error).split())[:300]}"
        raise Refused(
            f"The adapter {adapter} does not fit ({reason}): name the base that it was trained on."
        ) from error
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    # PEFT itself leaves factors that match nothing aside without a word.
    strange = sorted((own - saved.keys()) | {name for name in saved.keys() - own if "lora_" in name})
    if strange:
        raise Refused(
            f"The adapter {adapter} does not fit {type(model).__name__}: {len(strange)} tensors have no counterpart, "
            f"{strange[0]} first; name the base that it was trained on."
        )
    return adapted


def _refuse_residual(adapter: str) -> None:
    """PEFT would factorise the base again, which a randomised factorisation does not repeat."""
    config = _read(Path(adapter) / ADAPTER_CONFIG) if Path(adapter).is_dir() else {}
    if str(config.get("init_lora_weights", "")).startswith("pissa"):
        raise Refused(
            f"The adapter {adapter} holds PiSSA factors that fit only their residual base: name the converted adapter, "
            f"which a run leaves at the top of its output_dir."
        )


def _merge_layers(modules: Iterable[nn.Module]) -> None:
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in modules:
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            stored = {name: parameter.dtype for name, parameter in base.named_parameters()}
            base.to(torch.float32)
            layer.merge(safe_merge=True)
            for name, parameter in base.named_parameters():
                parameter.data = parameter.data.to(stored[name])


def _is_tied(read: nn.Module | None, written: nn.Module | None) -> bool:
    return read is not None and written is not None and read.get_parameter("weight") is written.get_parameter("weight")


def _untie(written: nn.Module) -> None:
    from torch import nn

    weight = written.get_parameter("weight")
    written.register_parameter("weight", nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))


def _tie_again_if_equal(model: PreTrainedModel) -> None:
    import torch

    read, written = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(read.get_parameter("weight"), written.get_parameter("weight")):
        written.register_parameter("weight", read.get_parameter("weight"))
    else:
        model.config.tie_word_embeddings = False
