"""What the loop, the checkpoints and the export need of whoever owns weights and optimizer.

The loop fills gradients with sums of token losses already divided by the global number of target tokens; an engine
turns that into one update, with as many collective calls on every rank whatever its share was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

_T = TypeVar("_T")


@dataclass(frozen=True)
class Applied:
    """What all ranks agree on after an update."""

    loss_sum: float
    """Token losses summed over the global batch."""
    grad_norm: float
    """Norm of the global gradient before clipping. Infinite where an fp16 step was skipped."""
    updated: bool
    """False: nothing to learn from (no target tokens), or fp16 overflowed and the scale was lowered."""
    stop: bool


class Engine(Protocol):
    """What the loop needs of whoever owns the optimizer."""

    kept_as: str
    """Whose files a checkpoint of it holds, in words: other engines cannot read them."""
    optimizer: Optimizer
    rank: int
    world: int
    lockstep: bool
    """Whether a forward or backward pass is collective: every rank then makes equally many, blank ones where its share
    of the samples is smaller, and each gradient is whole when its backward pass ends."""

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank has handed to collectives so far."""

    @property
    def model(self) -> nn.Module:
        """The model, its parameters as they are between two passes."""

    def start(self) -> None:
        """Make every rank's weights and buffers those of rank 0."""

    def forward(self, inputs: dict[str, Any]) -> Any:
        """The causal language model's own output; `inputs` are the arguments of its forward by name."""

    def loss_scale(self) -> float:
        """What losses are multiplied by before their backward; 1 except under fp16."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a scalar that is already multiplied by `loss_scale`."""

    def update(self, loss_sum: Tensor, targets: int, *, step: int, stop: bool) -> Applied:
        """Apply the gradient of one global batch and clear it. Collective.

        Args:
            loss_sum: this rank's sum of token losses, a scalar.
            targets: target tokens of the global batch; with 0 of them nothing is updated.
            step: the update's number, from 1, for messages.
            stop: whether this rank has been asked to stop.

        Raises:
            RunFailed: the global gradient is not finite (on all ranks alike).
        """

    def messages(self) -> list[str]:
        """What the optimizer has to say of the last update."""

    def measurements(self) -> dict[str, float]:
        """The optimizer's own figures of the last update. Waits for the device."""

    def total(self, values: Tensor) -> Tensor:
        """Sum of a small fp64 tensor over the ranks. Collective."""

    def gather(self, data: Tensor) -> list[Tensor]:
        """Every rank's copy of a byte tensor of one common length, by rank. Collective."""

    def read_together(self, read: Callable[[], _T]) -> _T:
        """What `read` makes of files, once it has read them on every rank. Collective.

        Raises:
            Refused: here or on another rank; on all of them.
        """

    def state(self) -> dict[str, float | int]:
        """What of the engine itself must survive a resume, plain numbers."""

    def restore(self, state: dict[str, float | int]) -> None:
        """Take back what `state` returned."""

    def save_weights(self, folder: Path, names: frozenset[str]) -> None:
        """Write this rank's part of the parameters `names` and of all buffers, in their stored dtype. Collective."""

    def load_weights(self, folder: Path, names: frozenset[str]) -> None:
        """Put back what `save_weights` wrote. Collective.

        Raises:
            Refused: a file is missing or damaged.
            ValueError: it was written for another model.
        """

    def save_optimizer(self, folder: Path) -> None:
        """Write this rank's part of the optimizer's state: tensors and plain numbers. Collective."""

    def load_optimizer(self, folder: Path) -> None:
        """Put back what `save_optimizer` wrote, dtypes and strides kept. Collective.

        Raises:
            Refused: a file is missing or damaged.
            KeyError, TypeError, ValueError, RuntimeError: it was written for another optimizer.
        """

    def digests(self) -> dict[str, str]:
        """SHA-256 of all weights and buffers (`weights`) and of the optimizer's state (`optimizer`). Collective."""

    def whole_model(self) -> nn.Module:
        """The model with whole weights on rank 0, for export; on other ranks it may be an empty shell. Collective."""
