"""Everything a resume needs, to and from a local folder. Storage moves the folders; Ray hands them over.

    weights.safetensors    what trains and all buffers, in their stored dtype
    optimizer.pt           the optimizer's state dict, tensors and plain numbers, dtypes and strides kept
    random.safetensors     torch, NumPy and Python random state of every rank
    initial.safetensors    what the strategy needs from the start of the run (PiSSA's A0 and B0)
    state.json             progress, whose files these are, the engine's own numbers (loss scale), names of the
                           optimizer's parameters in order

An engine that shares weights and moments out writes a file for each rank instead (`engines/shards.py`).

The learning rate and the data order are pure functions of the step and need no state. Files are written at update
boundaries only, and read with `weights_only=True` only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet.errors import LONGEST_REASON, Refused, first_line
from tunefleet.training.engines.engine import Engine
from tunefleet.training.engines.plain import OPTIMIZER, WEIGHTS
from tunefleet.training.files import digest, load_pickle, load_tensors, read, save_tensors
from tunefleet.training.progress import Progress
from tunefleet.training.random_state import capture, restore
from tunefleet_strategies.contract import Saved


@dataclass(frozen=True)
class RunState:
    """The live objects that a checkpoint is taken from and put back into."""

    engine: Engine
    trained: frozenset[str]
    """Names of the parameters that the method may change, at one time of the run or another."""
    initial: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.engine.model

    @property
    def optimizer(self) -> Optimizer:
        return self.engine.optimizer


@dataclass(frozen=True)
class Loaded:
    progress: Progress
    notices: tuple[str, ...]


def save(folder: Path, state: RunState, progress: Progress, *, only_weights: bool = False) -> None:
    """Write a checkpoint into the existing `folder`: rank 0 what is common, each rank what its engine shares out.

    Each rank has a folder of its own; storage makes one of them all, so no two ranks may use the same name. Collective.

    Args:
        only_weights: leave out what only a resume needs; `load` then refuses the checkpoint, `load_weights` takes it.
    """
    engine = state.engine
    random = engine.gather(capture(engine.model))
    engine.save_weights(folder, state.trained)
    if not only_weights:
        engine.save_optimizer(folder)
    if engine.rank != 0:
        return
    save_tensors(state.initial, folder / "initial.safetensors")
    document = {
        "progress": asdict(progress),
        "kept_as": engine.kept_as,
        "engine": engine.state(),
        "parameters": _numbered(engine),
    }
    (folder / "state.json").write_text(json.dumps(document, indent=1))
    if not only_weights:
        save_tensors({f"rank{rank}": own for rank, own in enumerate(random)}, folder / "random.safetensors")


def load(folder: Path, state: RunState) -> Loaded:
    """Put a checkpoint back into a freshly built run. Every rank sees the files of all ranks in `folder`. Collective.

    The optimizer must have been built as at the start of the run, the model attached with `load_initial`'s tensors.
    When the number of workers changed, ranks without a stored random state keep the one they were seeded with.

    Raises:
        Refused: a file is missing, damaged or made for another model or engine; the sentence names it.
    """
    document, random = state.engine.read_together(
        lambda: (
            read(folder / "state.json", lambda path: json.loads(path.read_text())),
            load_tensors(folder / "random.safetensors"),
        )
    )
    ours = state.engine.kept_as
    try:
        if (theirs := document["kept_as"]) != ours:
            raise Refused(
                f"The checkpoint {folder} was written under {theirs}, and its files cannot be read under {ours}: "
                f"train as it was trained, or write resume_from_checkpoint: false to start anew."
            )
        progress = Progress(**document["progress"])
        state.engine.load_weights(folder, state.trained)
        state.engine.load_optimizer(folder)
        state.engine.restore(document["engine"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Refused(
            f"The checkpoint {folder} does not belong to this run ({first_line(error, LONGEST_REASON)}): "
            "write resume_from_checkpoint: false to start anew."
        ) from error
    return Loaded(progress, _put_random(random, state.engine, folder))


def convert(folder: Path, change: Callable[[Saved], Saved]) -> None:
    """Rewrite what a method keeps in a local copy of a checkpoint, which must be one of plain data parallelism.

    Raises:
        Refused: a file is missing or damaged.
        Exception: what `change` raises; nothing is rewritten then.
    """
    document = read(folder / "state.json", lambda path: json.loads(path.read_text()))
    saved = Saved(
        load_tensors(folder / WEIGHTS), load_pickle(folder / OPTIMIZER), tuple(document.get("parameters") or ())
    )
    changed = change(saved)
    if changed.weights is not saved.weights:
        save_tensors(changed.weights, folder / f"new.{WEIGHTS}")
        (folder / f"new.{WEIGHTS}").replace(folder / WEIGHTS)  # what was read may still be mapped from the old file
    torch.save(dict(changed.optimizer), folder / OPTIMIZER)


def load_initial(folder: Path) -> dict[str, Tensor]:
    """What `Strategy.initial_state` returned when the run began, for `AttachContext.initial`.

    Raises:
        Refused: the file is missing or damaged.
    """
    return load_tensors(folder / "initial.safetensors")


def load_weights(folder: Path, state: RunState) -> None:
    """Put only the weights of a checkpoint back: what was best, at the end of a run.

    Raises:
        Refused: the file is missing, damaged or made for another model.
    """
    try:
        state.engine.load_weights(folder, state.trained)
    except ValueError as error:
        raise Refused(
            f"The checkpoint {folder} does not belong to this run ({error}): resume from another one."
        ) from error


def fingerprints(state: RunState) -> dict[str, str]:
    """SHA-256 of the weights (all of them), the optimizer state and every rank's random state. Collective.

    Two runs with equal fingerprints are bit-identical and stay so.
    """
    random = state.engine.gather(capture(state.engine.model))
    return {**state.engine.digests(), "random": digest(random)}


def trained_names(model: nn.Module) -> frozenset[str]:
    """What `RunState.trained` is of a model that a strategy has just been attached to."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _numbered(engine: Engine) -> list[str] | None:
    """Parameters by name in the optimizer's order; None where the engine has put others in their place."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    ids = [id(parameter) for group in engine.optimizer.param_groups for parameter in group["params"]]
    return [names[one] for one in ids] if names.keys() >= set(ids) else None


def _put_random(random: Mapping[str, Tensor], engine: Engine, folder: Path) -> tuple[str, ...]:
    if f"rank{engine.rank}" in random:
        try:
            restore(random[f"rank{engine.rank}"], engine.model)
        except RuntimeError as error:
            raise Refused(f"The random state in {folder} is damaged ({first_line(error, LONGEST_REASON)}).") from error
    if len(random) == engine.world:
        return ()
    return (
        f"The checkpoint was written by {'1 worker' if len(random) == 1 else f'{len(random)} workers'} and "
        f"{engine.world} continue: the result is not "
        "bit-identical to an uninterrupted run (dropout differs).",
    )
