"""BAdam's blocks: which parameters train together, in which order, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.parts import Anatomy


@dataclass(frozen=True)
class BlockNames:
    """Names of the parameters that train together."""

    label: str
    names: tuple[str, ...]


def blocks_of(names: Iterable[str], parts: Anatomy, *, embedding: bool, lm_head: bool) -> tuple[BlockNames, ...]:
    """The blocks of a model in the order that `badam_start_block` counts in.

    Embeddings (if they train), each decoder layer, the head with the final norm (if they train). A matrix that head and
    embedding share belongs to the embeddings.

    Args:
        names: of all parameters, in module order.

    Raises:
        StrategyError: the head is to train and is the embedding, which is not.
    """
    if lm_head and not embedding and parts.tied is not None:
        raise StrategyError(
            "badam_include_lm_head: the head of this model shares its matrix with the embedding; "
            "write badam_include_embedding: true as well, or drop badam_include_lm_head"
        )
    owners = {name: name.rpartition(".")[0] for name in names}
    shared = None if parts.tied is None else f"{parts.tied.head}.weight"
    layers = [
        BlockNames(layer, tuple(name for name in owners if name.startswith(f"{layer}."))) for layer in parts.layers
    ]
    tables = [name for name, owner in owners.items() if owner in parts.embeddings]
    rest = [
        name
        for name, owner in owners.items()
        if owner in parts.outside and owner not in parts.embeddings and name != shared
    ]
    first = [BlockNames("embedding", tuple(tables))] if embedding else []
    last = [BlockNames("lm_head", tuple(rest))] if lm_head else []
    return tuple(block for block in (*first, *layers, *last) if block.names)


def listed(labels: Sequence[str], chosen: Iterable[int]) -> str:
    """Labels in words, neighbours drawn together: "model.layers.3 to model.layers.7, lm_head"."""
    runs: list[list[int]] = []
    for place in sorted(chosen):
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(
        f"{labels[run[0]]} to {labels[run[-1]]}" if len(run) > 2 else ", ".join(labels[place] for place in run)
        for run in runs
    )
