"""BAdam: full tuning with the optimizer memory of one block, or of a share of the entries.

What: AdamW (Loshchilov & Hutter, arXiv 1711.05101) on a part of the weights that moves on every K updates (Luo et al.,
arXiv 2404.02827, algorithm 1). `badam_mode: layer`: the part is one block, a decoder layer as a rule; nothing is
computed backwards below it. `badam_mode: ratio`: the part is a share of the entries of every matrix.
When: full tuning is wanted and its gradients and moments do not fit. Layer mode is the faster one (on average half of
the backward pass falls away) and runs on any number of workers; ratio mode moves all layers at once, on one worker.
Settings: `badam_switch_interval` K (50; -1: never move on), and by mode
- layer: `badam_switch_mode` (ascending, descending, random: every block once in each round, fixed),
  `badam_start_block` (counted from 0 in the list of blocks), `badam_include_embedding` and `badam_include_lm_head`
  (these are blocks too, the first and the last; the final norm goes with the head);
- ratio: `badam_update_ratio` (0.05), `badam_mask_mode` (adjacent: a running window; scatter: spread by one fixed
  permutation for each parameter). Parameters with fewer than 100 entries train whole. The include keys say what
  trains here too.
`badam_verbose`: 1 says what each visit trains, 2 names its parameters (layer) or windows (ratio).
`optimizer_backend: upstream` runs the package badam's own optimizer, on one worker, without resume.
Formula: layer as torch's AdamW: p <- p - lr wd p, then p <- p - lr m^ / (sqrt(v^) + eps). Ratio has its epsilon outside
the bias correction: p <- p - lr m / (sqrt(v) + eps) sqrt(1 - b2^t) / (1 - b1^t), decay first, on active entries only.
A visit starts with m = v = 0 and t = 1; the learning-rate schedule goes on. How many updates u have been applied
decides what trains (visit u // K), so skipped updates and a resume do not shift the walk.
Bytes, N parameters of which N_b are in the largest block, k active, beside AdamW's 16 N (fp32) and 8 N (pure_bf16):
- layer, `pure_bf16`: 2 N weights + 2 N_b gradients + 12 N_b (fp32 master and moments); else 4 N + 4 N_b + 8 N_b;
- ratio, `pure_bf16`: 2 N + 2 N + 12 k; else 4 N + 4 N + 8 k; `scatter` 4 k more for its index.
Traps: `pure_bf16: true` is meant, for the master copy keeps small updates during a visit; it is read from the weights
again at the next one. Embeddings, final norm and head stay as they are unless included. A run shorter than K times the
number of blocks never reaches some (a notice names them). `fixed` still starts its moments again every K updates;
K = -1 does not. Ratio mode saves optimizer state only: gradients are whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet_strategies.blocks import BlockNames, blocks_of, listed
from tunefleet_strategies.contract import (
    ADAMW,
    AttachContext,
    Choice,
    Domain,
    Footprint,
    LogUniform,
    ModelShape,
    OptimizerSpec,
    ParameterShape,
    Precision,
    Saved,
    Strategy,
    Traits,
)
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.fields import BACKEND_WORDS, OptimizerBackend
from tunefleet_strategies.optim.block_adamw import Block, BlockAdamW
from tunefleet_strategies.optim.block_schedule import NEVER, BlockSchedule, SwitchMode
from tunefleet_strategies.optim.carrying import resized_visit
from tunefleet_strategies.optim.groups import grouped, trainable
from tunefleet_strategies.optim.ratio_adamw import MaskMode, RatioAdamW, active_entries
from tunefleet_strategies.parts import Anatomy
from tunefleet_strategies.targets import anatomy
from tunefleet_strategies.weights import hold, save_whole_model

FP32 = 4
"""Bytes of an entry of a moment, or of a master copy."""


class BAdam(Strategy):
    """Train the whole model, one block of layers (or one share of the entries) at a time."""

    name: ClassVar[str] = "badam"
    summary: ClassVar[str] = "one block of layers trains at a time, or a share of all entries"
    selector: ClassVar[Mapping[str, object]] = {"finetuning_type": "full", "use_badam": True}
    forms: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "badam_mode: ratio": {"badam_mode": "ratio"},
        "optimizer_backend: upstream": {"optimizer_backend": "upstream"},
        "badam_mode: ratio and optimizer_backend: upstream": {"badam_mode": "ratio", "optimizer_backend": "upstream"},
    }
    free: ClassVar[frozenset[str]] = frozenset({"badam_verbose"})

    badam_mode: Literal["layer", "ratio"] = Field(
        default="layer", description="What trains at a time: one block of layers, or a share of the entries of all."
    )
    badam_start_block: int | None = Field(
        default=None,
        ge=0,
        description="layer: the block that trains first, counted from 0; unset: the first, or the last if descending.",
    )
    badam_switch_mode: SwitchMode = Field(default="ascending", description="layer: the order of the blocks.")
    badam_switch_interval: int = Field(
        default=50, ge=NEVER, description="Updates after which the next part trains; -1 = never."
    )
    badam_update_ratio: float = Field(
        default=0.05, gt=0.0, le=1.0, description="ratio: the share of a parameter's entries that trains at a time."
    )
    badam_mask_mode: MaskMode = Field(
        default="adjacent", description="ratio: whether these entries are neighbours or spread over the parameter."
    )
    badam_verbose: int = Field(
        default=0, ge=0, le=2, description="1 says what trains whenever that changes, 2 names the parameters."
    )
    badam_include_embedding: bool = Field(default=False, description="Train the embeddings too; in layer mode a block.")
    badam_include_lm_head: bool = Field(
        default=False, description="Train the head and the final norm too; in layer mode a block."
    )
    optimizer_backend: OptimizerBackend = Field(default="native", description=BACKEND_WORDS)

    @model_validator(mode="after")
    def _consistent(self) -> BAdam:
        if self.badam_switch_interval == 0:
            raise ValueError(
                "badam_switch_interval: 0 gives a block no update; write a number such as 50, or -1 to never switch"
            )
        if self.optimizer_backend == "upstream" and self.badam_switch_interval == NEVER:
            raise ValueError(
                "badam_switch_interval: -1 makes optimizer_backend: upstream switch after every update; "
                "write optimizer_backend: native"
            )
        started = self.badam_mode == "layer" and self.badam_start_block is not None
        if self.optimizer_backend == "upstream" and self.badam_switch_mode == "random" and started:
            raise ValueError(
                "badam_start_block: badam_switch_mode: random fails with it under optimizer_backend: upstream; "
                "write optimizer_backend: native, or drop badam_start_block"
            )
        return self

    def unused(self) -> dict[str, str]:
        """Each mode has keys of its own; those of the other one do nothing."""
        foreign = {
            "layer": ("badam_update_ratio", "badam_mask_mode"),
            "ratio": ("badam_start_block", "badam_switch_mode"),
        }
        idle = dict.fromkeys(foreign[self.badam_mode], f"badam_mode is {self.badam_mode}")
        if self.optimizer_backend == "upstream":
            idle["badam_verbose"] = "optimizer_backend is upstream, which prints in the worker's own log"
        return idle

    def traits(self) -> Traits:
        """Layer mode runs on any number of workers; ratio mode, and the published optimizers, on one."""
        upstream = self.optimizer_backend == "upstream"
        if self.badam_mode == "ratio":
            # The published one masks gradients in hooks, and moves its mask once for each backward pass.
            return Traits(
                max_workers=1,
                limited_by="badam_mode: ratio" + (" and optimizer_backend: upstream" if upstream else ""),
                accumulation=not upstream,
                resumable=not upstream,
                decay=not upstream,
                optimizers=ADAMW,
            )
        if upstream:
            # Its random order comes from the global random state, which differs between workers.
            return Traits(max_workers=1, limited_by="optimizer_backend: upstream", resumable=False, optimizers=ADAMW)
        return Traits(shardings=frozenset({"zero3", "fsdp2"}), optimizers=ADAMW, in_turns=True)

    def attach(self, model: nn.Module, context: AttachContext) -> nn.Module:
        """Make everything trainable that some block has; the optimizer narrows it to one block at a time.

        Raises:
            StrategyError: the model has no list of layers, no such start block, or a tied head that cannot train alone.
        """
        blocks = self._blocks([name for name, _ in model.named_parameters()], anatomy(model))
        model.requires_grad_(False)
        for block in blocks:
            for name in block.names:
                model.get_parameter(name).requires_grad_(True)
        hold(model, context.precision)
        return model

    def _blocks(self, names: Sequence[str], parts: Anatomy) -> tuple[BlockNames, ...]:
        blocks = blocks_of(names, parts, embedding=self.badam_include_embedding, lm_head=self.badam_include_lm_head)
        if self.badam_mode == "layer" and self.badam_start_block is not None and self.badam_start_block >= len(blocks):
            raise StrategyError(
                f"badam_start_block: {self.badam_start_block} is no block of this model; choose from 0 to "
                f"{len(blocks) - 1}"
            )
        return blocks

    def _schedule(self, blocks: int, seed: int = 0) -> BlockSchedule:
        return BlockSchedule(blocks, self.badam_switch_interval, self.badam_switch_mode, self.badam_start_block, seed)

    def notices(self, model: nn.Module, updates: int | None = None, seed: int | None = None) -> list[str]:
        """What stays as it is for the whole run, and what fp32 weights cost."""
        parameters = tuple(ParameterShape(name, tuple(p.shape), False) for name, p in model.named_parameters())
        blocks = self._blocks([parameter.name for parameter in parameters], anatomy(model))
        found = self._left_out(parameters, blocks)
        if self.badam_mode == "layer" and updates is not None:
            found += self._never_visited(blocks, updates, seed)
        return found + self._lost_bytes(model, parameters, blocks) + self._published_rules()

    def _left_out(self, parameters: Sequence[ParameterShape], blocks: Sequence[BlockNames]) -> list[str]:
        trained = {name for block in blocks for name in block.names}
        kept = [parameter for parameter in parameters if parameter.name not in trained]
        if not kept:
            return []
        keys = {
            "badam_include_embedding: true": self.badam_include_embedding,
            "badam_include_lm_head: true": self.badam_include_lm_head,
        }
        mend = " and ".join(key for key, included in keys.items() if not included)
        return [
            f"badam leaves {', '.join(parameter.name for parameter in kept)} as they are "
            f"({sum(parameter.numel for parameter in kept):,} of {sum(p.numel for p in parameters):,} parameters); "
            f"{mend} would train them"
        ]

    def _never_visited(self, blocks: Sequence[BlockNames], updates: int, seed: int | None) -> list[str]:
        """The blocks that a run of so many updates does not reach, by simulating its schedule."""
        upstream = self.optimizer_backend == "upstream"
        # The published optimizer moves on one update early, once.
        counted = updates + 1 if upstream and self.badam_switch_interval > 1 else updates
        visited = self._schedule(len(blocks), seed or 0).visited(counted)
        if len(visited) == len(blocks):
            return []
        labels = [block.label for block in blocks]
        keys = f"badam_switch_mode: {self.badam_switch_mode} and badam_switch_interval: {self.badam_switch_interval}"
        if updates >= len(blocks):
            mend = f"badam_switch_interval: {updates // len(blocks)} would reach every block"
            mend += "" if self.badam_switch_mode != "fixed" else ", with badam_switch_mode: ascending"
        else:
            mend = f"it takes at least {len(blocks)} updates to reach every block"
        # It draws from the global random state, so its order is not known beforehand.
        drawn = self.badam_switch_mode == "random" and (upstream or seed is None)
        never = set(range(len(blocks))) - visited
        told = f"{len(never)} of {len(blocks)} blocks, drawn at random," if drawn else listed(labels, never)
        return [f"{keys} never train {told} in {updates} updates; {mend}"]

    def _published_rules(self) -> list[str]:
        """What the published optimizer of layer mode does otherwise, where nothing fails that would tell of it."""
        if self.optimizer_backend == "native" or self.badam_mode == "ratio":
            return []
        return [
            "optimizer_backend: upstream keeps the rules of the package badam: the first block gets one update less, "
            "and weight_decay touches norms and biases too; optimizer_backend: native does neither"
        ]

    def _lost_bytes(
        self, model: nn.Module, parameters: Sequence[ParameterShape], blocks: Sequence[BlockNames]
    ) -> list[str]:
        """BAdam asks for bf16 weights: it keeps an fp32 copy of what is active, so the others need none."""
        trained = model.get_parameter(blocks[0].names[0]).dtype
        if trained != torch.float32:
            return []
        names = {name for block in blocks for name in block.names}
        frozen = next((p.dtype for name, p in model.named_parameters() if name not in names), trained)
        pure = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
        lost = _total(self._bytes(parameters, blocks, Precision(trained, trained, frozen)))
        lost -= _total(self._bytes(parameters, blocks, pure))
        if lost <= 0:
            return []
        return [
            f"badam holds every weight that it trains in fp32, because pure_bf16 is not set; that takes {lost:,} bytes "
            "more than bf16 weights with an fp32 copy of what is active; write pure_bf16: true to save them"
        ]

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """AdamW on what is active; norms and biases are not decayed.

        Raises:
            StrategyError: the recipe names another optimizer than AdamW, or the mode cannot run here.
        """
        self.refuse_optimizer(spec.name)
        groups = grouped(trainable(model), spec)
        parameters = dict(model.named_parameters())
        blocks = [
            Block(block.label, {name: parameters[name] for name in block.names})
            for block in self._blocks([*parameters], anatomy(model))
        ]
        if self.optimizer_backend == "upstream":
            # Imported here because the package loads transformers, and reading a recipe needs neither.
            from tunefleet_strategies.optim.upstream_badam import upstream_badam

            return upstream_badam(self, model, groups, blocks, spec)
        if self.badam_mode == "layer":
            schedule = self._schedule(len(blocks), spec.seed)
            return BlockAdamW(groups, blocks, schedule, spec, verbose=self.badam_verbose)
        return RatioAdamW(
            groups,
            {name: parameter for block in blocks for name, parameter in block.parameters.items()},
            spec,
            ratio=self.badam_update_ratio,
            interval=self.badam_switch_interval,
            mask_mode=self.badam_mask_mode,
            verbose=self.badam_verbose,
        )

    def footprint(self, shape: ModelShape, precision: Precision) -> Footprint:
        """All weights; in layer mode gradients and state of the largest block that is visited, else of a share."""
        if shape.anatomy is None:
            raise StrategyError(f"{shape.architecture} keeps its layers in no list; use finetuning_type: full")
        blocks = self._blocks([parameter.name for parameter in shape.parameters], shape.anatomy)
        return self._bytes(shape.parameters, blocks, precision)

    def _bytes(
        self, parameters: Sequence[ParameterShape], blocks: Sequence[BlockNames], precision: Precision
    ) -> Footprint:
        sizes = {parameter.name: parameter.numel for parameter in parameters}
        weight = precision.trainable.itemsize
        trained = [sizes[name] for block in blocks for name in block.names]
        weights = weight * sum(trained) + precision.frozen.itemsize * (sum(sizes.values()) - sum(trained))
        if self.badam_mode == "ratio":
            return Footprint(weights, weight * sum(trained), self._ratio_state(trained, weight))
        largest = max(self._visited(blocks), key=lambda block: sum(sizes[name] for name in block.names))
        entries = sum(sizes[name] for name in largest.names)
        # The published optimizer copies fp32 weights too, and counts updates in a tensor for each parameter.
        upstream = self.optimizer_backend == "upstream"
        master = 0 if weight == FP32 and not upstream else FP32
        counters = FP32 * len(largest.names) if upstream else 0
        return Footprint(weights, weight * entries, (master + 2 * FP32) * entries + counters)

    def _ratio_state(self, trained: Sequence[int], weight: int) -> int:
        """Moments, the master copy beside bf16 weights, and the places of spread entries."""
        if self.optimizer_backend == "upstream":
            return sum(2 * weight * int(entries * self.badam_update_ratio) for entries in trained)
        active = [active_entries(entries, self.badam_update_ratio) for entries in trained]
        master = 0 if weight == FP32 else FP32
        spread = [k for k, entries in zip(active, trained, strict=True) if k < entries]
        index = FP32 * sum(spread) if self.badam_mask_mode == "scatter" else 0
        return (master + 2 * FP32) * sum(active) + index

    def _visited(self, blocks: Sequence[BlockNames]) -> Sequence[BlockNames]:
        """The blocks that a long run visits; all of them where chance decides."""
        moves = self.badam_switch_interval != NEVER and self.badam_switch_mode != "fixed"
        drawn = self.badam_switch_mode == "random" and self.badam_start_block is None
        return blocks if moves or drawn else [blocks[self._schedule(len(blocks)).block(0)]]

    def search_space(self) -> dict[str, Domain]:
        """How long a part trains, which part, and how fast."""
        space: dict[str, Domain] = {"badam_switch_interval": Choice((25, 50, 100))}
        if self.badam_mode == "layer":
            space["badam_switch_mode"] = Choice(("ascending", "descending", "random"))
        else:
            space["badam_update_ratio"] = Choice((0.01, 0.02, 0.05, 0.1))
            space["badam_mask_mode"] = Choice(("adjacent", "scatter"))
        return {**space, "learning_rate": LogUniform(1e-6, 1e-4)}

    def mutable(self) -> Mapping[str, str | None]:
        """The interval, where the state can be saved at all."""
        why = "optimizer_backend: upstream cannot save its state" if self.optimizer_backend == "upstream" else None
        return {"badam_switch_interval": why}

    def carried(self, saved: Saved, now: Self, seed: int) -> Saved:
        """The visit under way goes on until it has had the new number of updates."""
        return Saved(saved.weights, resized_visit(saved.optimizer, now.badam_switch_interval), saved.numbered)

    def export(self, model: nn.Module, folder: Path, initial: Mapping[str, Tensor]) -> None:
        """Write the whole model in one number format, as `transformers` loads it."""
        save_whole_model(model, folder)


def _total(footprint: Footprint) -> int:
    return footprint.weights + footprint.gradients + footprint.optimizer_state
