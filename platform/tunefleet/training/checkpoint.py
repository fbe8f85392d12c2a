"""Everything a resume needs, to and from a local folder. Storage moves the folders; Ray hands them over.

    weights.safetensors    what trains and all buffers, in their stored dtype
    optimizer.pt           the optimizer's state dict, tensors and plain numbers, dtypes and strides kept
    random.safetensors     torch, NumPy and Python random state of every rank
    initial.safetensors    what the strategy needs from the start of the run (PiSSA's A0 and B0)
    state.json             progress, and the engine's own numbers (loss scale)

The learning rate and the data order are pure functions of the step and need no state. Files are written at update
boundaries only, and read with `weights_only=True` only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet.errors import Refused
from tunefleet.training.engines import Engine
from tunefleet.training.random_state import capture, restore

_T = TypeVar("_T")

_DAMAGE = (OSError, TypeError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError, SafetensorError)
"""What the readers of the three formats raise when bytes are missing or wrong."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands at an update boundary."""

    step: int = 0
    """Updates applied, also the index of the next one in the batch schedule."""
    record: Mapping[str, int | float | None] = field(default_factory=dict)
    """The sums that whoever records the run goes on from (`artifacts.record.Recorder.state`)."""


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
    """Write a checkpoint. Collective: every rank calls it, rank 0 writes into the existing `folder`.

    Args:
        only_weights: leave out what only a resume needs; `load` then refuses the checkpoint, `load_weights` takes it.
    """
    random = state.engine.gather(capture(state.engine.model))
    if state.engine.rank != 0:
        return
    _save_tensors(_weights(state), folder / "weights.safetensors")
    _save_tensors(dict(state.initial), folder / "initial.safetensors")
    document = {"progress": asdict(progress), "engine": state.engine.state()}
    (folder / "state.json").write_text(json.dumps(document, indent=1))
    if only_weights:
        return
    _save_tensors({f"rank{rank}": own for rank, own in enumerate(random)}, folder / "random.safetensors")
    torch.save(state.optimizer.state_dict(), folder / "optimizer.pt")


def load(folder: Path, state: RunState) -> Loaded:
    """Put a checkpoint back into a freshly built run. Every rank calls it with its own copy of the folder.

    The optimizer must have been built as at the start of the run, the model attached with `load_initial`'s tensors.
    When the number of workers changed, ranks without a stored random state keep the one they were seeded with.

    Raises:
        Refused: a file is missing, damaged or made for another model; the sentence names it.
    """
    document = _read(folder / "state.json", lambda path: json.loads(path.read_text()))
    weights = _read(folder / "weights.safetensors", load_file)
    optimizer = _read(folder / "optimizer.pt", _load_pickle)
    random = _read(folder / "random.safetensors", load_file)
    try:
        progress = Progress(**document["progress"])
        _put_weights(state, weights)
        _put_optimizer(state.optimizer, optimizer)
        state.engine.restore(document["engine"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Refused(
            f"The checkpoint {folder} does not belong to this run ({_first_line(error)}): "
            "write resume_from_checkpoint: false to start anew."
        ) from error
    return Loaded(progress, _put_random(random, state.engine, folder))


def load_initial(folder: Path) -> dict[str, Tensor]:
    """What `Strategy.initial_state` returned when the run began, for `AttachContext.initial`.

    Raises:
        Refused: the file is missing or damaged.
    """
    return _read(folder / "initial.safetensors", load_file)


def load_weights(folder: Path, state: RunState) -> None:
    """Put only the weights of a checkpoint back: what was best, at the end of a run.

    Raises:
        Refused: the file is missing, damaged or made for another model.
    """
    weights = _read(folder / "weights.safetensors", load_file)
    try:
        _put_weights(state, weights)
    except ValueError as error:
        raise Refused(
            f"The checkpoint {folder} does not belong to this run ({error}): resume from another one."
        ) from error


def fingerprints(state: RunState) -> dict[str, str]:
    """SHA-256 of the weights (all of them), the optimizer state and every rank's random state. Collective.

    Two runs with equal fingerprints are bit-identical and stay so.
    """
    everything = {**dict(state.model.named_parameters()), **dict(state.model.named_buffers())}
    random = state.engine.gather(capture(state.engine.model))
    return {
        "weights": _digest(sorted(everything.items())),
        "optimizer": _digest(_flatten("", state.optimizer.state_dict())),
        "random": _digest((str(rank), own) for rank, own in enumerate(random)),
    }


def trained_names(model: nn.Module) -> frozenset[str]:
    """What `RunState.trained` is of a model that a strategy has just been attached to."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _weights(state: RunState) -> dict[str, Tensor]:
    trained = {name: p.detach() for name, p in state.model.named_parameters() if name in state.trained}
    return trained | {f"buffer:{name}": b.detach() for name, b in state.model.named_buffers()}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Clones, because safetensors refuses tensors that share storage, as an architecture's buffers may.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _load_pickle(path: Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError("it holds no optimizer state")
    return state


def _read(path: Path, reader: Callable[[Path], _T]) -> _T:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise Refused(f"The checkpoint file {path} is missing: resume from another checkpoint.") from error
    except _DAMAGE as error:
        raise Refused(
            f"The checkpoint file {path} is damaged ({_first_line(error)}): resume from another checkpoint."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]


@torch.no_grad()
def _put_weights(state: RunState, weights: Mapping[str, Tensor]) -> None:
    expected = _weights(state)
    if expected.keys() != weights.keys():
        odd = sorted(expected.keys() ^ weights.keys())
        raise ValueError(f"{len(odd)} tensors are not in both, the first is {odd[0]}")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape or tensor.dtype != weights[name].dtype:
            raise ValueError(f"{name} has another shape or dtype")
        tensor.copy_(weights[name])


def _put_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict`, then undo its cast: torch gives floating-point state the dtype of its parameter."""
    optimizer.load_state_dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.state_dict()["state"].keys() != saved["state"].keys():
        raise ValueError("the optimizer keeps state of other parameters")
    for index, stored in saved["state"].items():
        if not isinstance(index, int):  # an optimizer with its own layout restores it itself
            continue
        live = optimizer.state[parameters[index]]
        for name, value in stored.items():
            if isinstance(value, Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(live[name].device)


def _put_random(random: Mapping[str, Tensor], engine: Engine, folder: Path) -> tuple[str, ...]:
    if f"rank{engine.rank}" in random:
        try:
            restore(random[f"rank{engine.rank}"], engine.model)
        except RuntimeError as error:
            raise Refused(f"The random state in {folder} is damaged ({_first_line(error)}).") from error
    if len(random) == engine.world:
        return ()
    return (
        f"The checkpoint was written by {len(random)} workers and {engine.world} continue: the result is not "
        "bit-identical to an uninterrupted run (dropout differs).",
    )


def _flatten(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _flatten(f"{prefix}/{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from _flatten(f"{prefix}/{position}", item)
    else:
        yield prefix, value


def _digest(items: Iterable[tuple[str, object]]) -> str:
    digest = hashlib.sha256()
    for name, value in items:
        digest.update(name.encode())
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            digest.update(f"{data.dtype}{tuple(data.shape)}{tuple(value.stride())}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
