"""Where things are in a model: its decoder layers, the linear maps inside them, and what stands outside.

Names resolve on the module tree, never on substrings: a name matches a module whose path equals it or ends with a dot
and the name. Expert number 3 is therefore never taken for layer 3, nor `norm` for `input_layernorm`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.fields import ALL
from tunefleet_strategies.parts import Anatomy, Tied


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with a weight matrix that low-rank factors can stand beside."""
    if isinstance(module, nn.Linear):
        return True
    # Imported here because reading a recipe needs this module but no model, and transformers loads for seconds.
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def anatomy(model: nn.Module, modules: Sequence[tuple[str, nn.Module]] | None = None) -> Anatomy:
    """Find the parts of a model.

    Args:
        model: the model as it was loaded.
        modules: its modules by path, where they are not simply `named_modules` (adapters stand around some of them).

    Raises:
        StrategyError: the model has no list of layers.
    """
    modules = list(model.named_modules()) if modules is None else modules
    layer_list = _layer_list(model)
    prefix = f"{layer_list}."
    inside = [(path, module) for path, module in modules if path.startswith(prefix)]
    outside = [
        (path, module)
        for path, module in modules
        if not path.startswith(prefix) and any(True for _ in module.parameters(recurse=False))
    ]
    return Anatomy(
        layers=tuple(f"{prefix}{name}" for name, _ in model.get_submodule(layer_list).named_children()),
        linears=tuple(path for path, module in inside if is_linear(module)),
        fused=tuple(
            f"{path}.{name}"
            for path, module in inside
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3
        ),
        outside=tuple(path for path, _ in outside),
        embeddings=tuple(path for path, module in outside if isinstance(module, nn.Embedding)),
        heads=tuple(path for path, module in outside if is_linear(module)),
        tied=_tied(model, outside),
    )


def _layer_list(model: nn.Module) -> str:
    """The path of the list of decoder layers: the one with most parameters, the outer one of equals.

    A list of experts stands inside a layer, so it holds less. A vision tower has a list of its own, a smaller one.
    """
    lists: list[str] = [
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    sizes = {path: _entries(model.get_submodule(path)) for path in lists}
    if not any(sizes.values()):
        raise StrategyError(
            f"{type(model).__name__} keeps its layers in no nn.ModuleList, so they cannot be told apart; "
            "use finetuning_type: full"
        )
    return max(sizes, key=lambda path: sizes[path])


def _entries(module: nn.Module) -> int:
    return sum(int(parameter.numel()) for parameter in module.parameters())


def _tied(model: nn.Module, outside: Sequence[tuple[str, nn.Module]]) -> Tied | None:
    """The head and embedding that share one matrix.

    On meta tensors parameters may not be shared yet, so the model's own table of tied weights is read as well.
    """
    embeddings = [(path, module) for path, module in outside if isinstance(module, nn.Embedding)]
    heads = [(path, module) for path, module in outside if is_linear(module)]
    from transformers import PreTrainedModel  # here for the reason given in is_linear

    table: dict[str, str] = {}
    if isinstance(model, PreTrainedModel) and model.config.get_text_config().tie_word_embeddings:
        table = model.all_tied_weights_keys or {}
    for embedding, table_module in embeddings:
        for head, head_module in heads:
            shared = table_module.weight is head_module.weight
            if shared or table.get(f"{head}.weight") == f"{embedding}.weight":
                return Tied(embedding, head)
    return None


def matching(name: str, paths: Iterable[str]) -> list[str]:
    """The paths that a name means: equal to it, or ending with a dot and the name."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def last_pieces(paths: Iterable[str]) -> tuple[str, ...]:
    """The distinct last pieces of paths, in order of appearance."""
    return tuple(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def unknown_target(key: str, name: str, choices: Sequence[str], what: str) -> StrategyError:
    """The error for a name that matches nothing: what is near it, or what there is."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    hint = f"did you mean `{near[0]}`?" if near else f"choose from {', '.join(choices)}"
    return StrategyError(f"{key}: `{name}` matches no {what} of this model; {hint}")


@dataclass(frozen=True)
class LoraTargets:
    """What low-rank factors go on."""

    modules: tuple[str, ...]
    """Paths of linear maps and embeddings."""
    parameters: tuple[str, ...]
    """Paths of fused expert parameters."""


def lora_targets(parts: Anatomy, names: Sequence[str]) -> LoraTargets:
    """Resolve `lora_target`.

    `all` means every linear map inside the layers and the fused experts, never embeddings or the head.

    Raises:
        StrategyError: a name matches nothing that can be adapted.
    """
    if tuple(names) == (ALL,):
        return LoraTargets(parts.linears, parts.fused)
    adaptable = (*parts.embeddings, *parts.linears, *parts.heads)
    modules: set[str] = set()
    parameters: set[str] = set()
    for name in names:
        found, found_fused = matching(name, adaptable), matching(name, parts.fused)
        if not found and not found_fused:
            choices = (*last_pieces(parts.linears), *last_pieces(parts.fused), *last_pieces(parts.outside))
            raise unknown_target("lora_target", name, (ALL, *choices), "linear layer or embedding")
        modules.update(found)
        parameters.update(found_fused)
    return LoraTargets(
        tuple(path for path in adaptable if path in modules), tuple(path for path in parts.fused if path in parameters)
    )


def matrices_within(parts: Anatomy, names: Sequence[str], key: str) -> tuple[str, ...]:
    """Paths of the matrices that names mean: of the modules themselves and of all that stand inside them.

    `all` means every linear map inside the layers and the fused experts, never embeddings or the head.

    Raises:
        StrategyError: a name means no matrix of a linear map, or one that the embedding shares.
    """
    inside = (*(f"{path}.weight" for path in parts.linears), *parts.fused)
    if tuple(names) == (ALL,):
        return inside
    heads = tuple(f"{path}.weight" for path in parts.heads)
    chosen: set[str] = set()
    for name in names:
        found = [path for path in (*inside, *heads) if f".{name}." in f".{path}."]
        if not found:
            pieces = dict.fromkeys(piece for path in (*inside, *heads) for piece in path.split(".")[:-1])
            choices = [piece for piece in pieces if not piece.isdecimal()]
            raise unknown_target(key, name, (ALL, *choices), "module with a linear map")
        if parts.tied is not None and f"{parts.tied.head}.weight" in found:
            raise StrategyError(
                f"{key}: `{name}` shares its matrix with the embedding in this model, which is no linear map; drop it"
            )
        chosen.update(found)
    return tuple(path for path in (*inside, *heads) if path in chosen)


def outside_modules(parts: Anatomy, names: Sequence[str], key: str) -> tuple[str, ...]:
    """Resolve names of modules outside the layers (`embed_tokens`, `norm`, `lm_head`) to their paths.

    Raises:
        StrategyError: a name matches nothing, or means the head of tied embeddings.
    """
    found: list[str] = []
    for name in names:
        paths = matching(name, parts.outside)
        if not paths:
            raise unknown_target(key, name, last_pieces(parts.outside), "module outside the layers")
        if parts.tied is not None and parts.tied.head in paths:
            embedding = last_pieces([parts.tied.embedding])[0]
            raise StrategyError(
                f"{key}: `{name}` shares its matrix with the embedding in this model; name `{embedding}` instead, "
                "which trains both"
            )
        found.extend(paths)
    return tuple(dict.fromkeys(found))
