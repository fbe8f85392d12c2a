"""DeepSpeed ZeRO, stages 1 to 3: optimizer state, gradients and weights shared out over the ranks.

DeepSpeed averages over ranks and would divide by micro-batches; losses come divided by the targets of the global batch
and are multiplied by the number of ranks here, so that what it steps on is the exact sum. Clipping uses the norm of
that sum. The optimizer is the method's own, over flat parts: AdamW and SGD work entry by entry, so the result is the
same as over whole tensors.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet.errors import Refused, RunFailed
from tunefleet.models import causal_lm
from tunefleet.training.deepspeed_config import Config
from tunefleet.training.engines import zero_shards
from tunefleet.training.engines.engine import Applied
from tunefleet.training.engines.plain import OPTIMIZER, WEIGHTS, not_finite, put
from tunefleet.training.engines.ranks import Ranks
from tunefleet.training.files import digest, load_pickle, load_tensors, save_tensors
from tunefleet_strategies.contract import InTurns, MethodOptimizer

_SMALLEST_SCALE = 1.0
"""Below this loss scale fp16 gradients are not overflowing, they are broken."""

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What of DeepSpeed's dynamic loss scaler changes during a run."""


def prepare_deepspeed() -> None:
    """Let DeepSpeed talk over the process group that there is. Once for each process; more do nothing."""
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch is about to change, once for each of them that it says so.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        # DeepSpeed would compile an all-reduce for inference through shared memory, a minute that training never uses.
        # It probes once and keeps this table, which it lets callers edit.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False)


class ZeroEngine(Ranks):
    """One rank of a run under ZeRO.

    `bytes_sent` has the engine's own few words, and with DeepSpeed's `comms_logger: {enabled: true}` (which waits for
    every collective) all that DeepSpeed sends too.
    """

    kept_as = "deepspeed"
    lockstep = True

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: Config, *, exported: frozenset[str]) -> None:
        """
        Args:
            model: with the method attached; under stage 3 loaded in parts, adapters whole.
            config: filled by `deepspeed_config.fill`.
            exported: names of the parameters that `whole_model` must hold.
        """
        super().__init__(next(model.parameters()).device)
        self.model = model
        self.optimizer = optimizer
        self.stage: int = config["zero_optimization"]["stage"]
        self._config = config
        self._exported = exported
        self._fp16: bool = config["fp16"]["enabled"]
        self._turns = optimizer if isinstance(optimizer, InTurns) else None
        self._deepspeed: Any = None
        self._bytes_before = _bytes_logged()
        self._wrap()

    def _wrap(self) -> None:
        """Give what trains now to DeepSpeed. Collective."""
        import deepspeed

        if self._deepspeed is not None:
            self._unwrap()
        self._inner = self.optimizer if self._turns is None else self._turns.turn_optimizer()
        self._deepspeed = deepspeed.initialize(
            model=causal_lm(self.model), optimizer=self._inner, config=self._config, dist_init_required=False
        )[0]

    def _unwrap(self) -> None:
        self._deepspeed.destroy()
        self._deepspeed.module_forward_pre_hook.remove()
        self._deepspeed.module_forward_post_hook.remove()
        self._deepspeed = None

    @property
    def _wrapped(self) -> zero_shards.Wrapped:
        return self._deepspeed.optimizer

    @property
    def bytes_sent(self) -> int:
        return super().bytes_sent + _bytes_logged() - self._bytes_before

    def start(self) -> None:
        """Parameters come from rank 0 when DeepSpeed wraps them; buffers from here."""
        for buffer in self.model.buffers():
            self._share(buffer)

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self._deepspeed(**inputs)

    def loss_scale(self) -> float:
        return 1.0  # DeepSpeed scales fp16 itself

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss * self.world, scale_wrt_gas=False)

    def update(self, loss_sum: Tensor, targets: int, *, step: int, stop: bool) -> Applied:
        knowledge = torch.tensor([float(loss_sum), float(stop)], dtype=torch.float64)
        loss, wants_stop = self.total(knowledge).tolist()
        if targets == 0:
            return Applied(loss, 0.0, False, wants_stop > 0)
        self._take_rates()
        self._deepspeed.step()
        zero_shards.forget_gradients(self._wrapped)
        if not self._deepspeed.was_step_applied():  # the norm of the sum is not finite, on all ranks
            if not self._fp16 or self._wrapped.loss_scale <= _SMALLEST_SCALE:
                raise RunFailed(not_finite(step, float("inf")))
            return Applied(loss, float("inf"), False, wants_stop > 0)
        norm = float(self._deepspeed.get_global_grad_norm())
        if self._turns is not None and self._turns.advance():
            self._wrap()
        return Applied(loss, norm, True, wants_stop > 0)

    def _take_rates(self) -> None:
        """Give the learning rates of the method's groups to the groups of the present turn."""
        if self._turns is None:
            return
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        for group in self._inner.param_groups:
            group["lr"] = rates[group["name"]]

    def messages(self) -> list[str]:
        return self.optimizer.messages() if isinstance(self.optimizer, MethodOptimizer) else []

    def measurements(self) -> dict[str, float]:
        return self.optimizer.measurements() if isinstance(self.optimizer, MethodOptimizer) else {}

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, float | int]:
        """The number of ranks, and fp16's loss scale."""
        found: dict[str, float | int] = {"world": self.world, "stage": self.stage}
        if self._fp16:
            scaler = self._wrapped.loss_scaler
            found |= {name: vars(scaler)[name] for name in _SCALER_FIELDS}
        return found

    def restore(self, state: dict[str, float | int]) -> None:
        if self._fp16:
            for name in _SCALER_FIELDS:
                setattr(self._wrapped.loss_scaler, name, state[name])

    def save_weights(self, folder: Path, names: frozenset[str]) -> None:
        if self.stage < 3 and self.rank > 0:
            return
        with self._only_parts():
            name = WEIGHTS if self.stage < 3 else self._file_of(self.rank, WEIGHTS)
            save_tensors(self._weights(names), folder / name)

    @torch.no_grad()
    def load_weights(self, folder: Path, names: frozenset[str]) -> None:
        if self.stage < 3:
            stored: Mapping[str, Tensor] = self.read_together(lambda: load_tensors(folder / WEIGHTS))
        else:
            stored = self._load(folder, WEIGHTS, load_tensors)
        with self._only_parts():
            put(self._weights(names), stored)

    def save_optimizer(self, folder: Path) -> None:
        torch.save(self._optimizer_state(), folder / self._file_of(self.rank, OPTIMIZER))

    @torch.no_grad()
    def load_optimizer(self, folder: Path) -> None:
        """Stand at the saved turn first: only then do the parts have the saved shapes."""
        saved = self._load(folder, OPTIMIZER, load_pickle)
        if self._turns is not None:
            self._turns.stand_at(saved["updates"])
            self._wrap()
        live = zero_shards.masters(self._wrapped)
        if [master.shape for master in live] != [torch.Size(one["shape"]) for one in saved["parts"]]:
            raise ValueError("the optimizer has other parts")
        with self._only_parts():
            for master, part in zip(live, saved["parts"], strict=True):
                if "master" in part:
                    master.data.copy_(part["master"])
                self._inner.state[master] = {
                    name: value.to(master.device) if isinstance(value, Tensor) else value
                    for name, value in part["state"].items()
                }
            if any("master" in part for part in saved["parts"]):
                zero_shards.put_masters_into_weights(self._wrapped, self.stage)

    def digests(self) -> dict[str, str]:
        with self._only_parts():
            parts = {name: zero_shards.part_of(p) for name, p in self.model.named_parameters()}
            own = {
                "weights": digest(parts | {f"buffer:{name}": b for name, b in self.model.named_buffers()}),
                "optimizer": digest(self._optimizer_state()),
            }
        return {name: self._common(value) for name, value in own.items()}

    def whole_model(self) -> nn.Module:
        """Gathered one parameter at a time; rank 0 keeps it, the others let go of it. Ends the engine's work."""
        if self.stage < 3:
            return self.model
        import deepspeed

        parameters = {name: p for name, p in self.model.named_parameters() if zero_shards.is_shared_out(p)}
        kept: dict[str, Tensor] = {}
        with self._only_parts(renew=False):
            for name, parameter in parameters.items():
                if name not in self._exported:
                    continue
                with deepspeed.zero.GatheredParameters([parameter]):
                    if self.rank == 0:
                        kept[name] = parameter.detach().cpu().clone()
        self._unwrap()
        for name, whole in kept.items():
            parameters[name].data = whole
        return self.model

    def _load(self, folder: Path, name: str, reader: Callable[[Path], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Read this rank's file, once it is clear that every rank finds its own. Collective.

        Raises:
            Refused: files are missing or damaged, or are those of another number of workers.
        """
        return self.read_together(lambda: reader(self._own_file(folder, name)))

    def _own_file(self, folder: Path, name: str) -> Path:
        """Where this rank's part lies; refused as in `_load`."""
        stem, _, ending = name.rpartition(".")
        found = sorted(folder.glob(f"{stem}-*-of-*.{ending}"))
        if found and not found[0].stem.endswith(f"-of-{self.world}"):
            raise Refused(
                f"The checkpoint {folder} was shared out by ZeRO over {len(found)} workers and {self.world} continue, "
                f"and ZeRO's parts fit one number of workers only: write ray_num_workers: {len(found)}."
            )
        for rank in range(self.world):
            path = folder / self._file_of(rank, name)
            if not path.is_file():
                raise Refused(f"The checkpoint file {path} is missing: resume from another checkpoint.")
        return folder / self._file_of(self.rank, name)

    @contextmanager
    def _only_parts(self, *, renew: bool = True) -> Iterator[None]:
        """Inside, what stage 3 keeps whole is parted; afterwards it is whole again, as the parts say."""
        if self.stage == 3:
            zero_shards.forget_whole_copies(self._wrapped)
        try:
            yield
        finally:  # also on a rank whose disk is full: the others are waiting for it
            if self.stage == 3 and renew:
                zero_shards.renew_whole_copies(self._wrapped)

    def _weights(self, names: frozenset[str]) -> dict[str, Tensor]:
        """This rank's parts of `names`, flat where they are parted, and all buffers."""
        found = {name: zero_shards.part_of(p) for name, p in self.model.named_parameters() if name in names}
        return found | {f"buffer:{name}": b.detach() for name, b in self.model.named_buffers()}

    def _optimizer_state(self) -> dict[str, Any]:
        """Masters where they are not the weights themselves, and the state of each."""
        live = zero_shards.masters(self._wrapped)
        aliased = self.stage == 3 and all(
            master.data_ptr() == weights.data_ptr()
            for master, weights in zip(live, self._wrapped.fp16_partitioned_groups_flat, strict=True)
        )
        parts = [
            {"shape": list(master.shape), "state": state} | ({} if aliased else {"master": master.detach()})
            for master, state in zip(live, zero_shards.state_of(self._inner, self._wrapped), strict=True)
        ]
        found: dict[str, Any] = {"parts": parts}
        return found if self._turns is None else found | {"updates": self._turns.updates}

    def _common(self, own: str) -> str:
        """One hash of all ranks'. Collective."""
        pieces = self.gather(torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8))
        return hashlib.sha256(b"".join(piece.numpy().tobytes() for piece in pieces)).hexdigest()

    def _file_of(self, rank: int, name: str) -> str:
        """The name of a rank's own file, which says of how many."""
        stem, _, ending = name.rpartition(".")
        return f"{stem}-{rank + 1}-of-{self.world}.{ending}"


def _bytes_logged() -> int:
    """All that DeepSpeed's logger of collectives has seen in this process; 0 where it is off."""
    from deepspeed.comm.comm import comms_logger

    operations = comms_logger.get_raw_data().values()
    return sum(size * calls[0] for sizes in operations for size, calls in sizes.items())
