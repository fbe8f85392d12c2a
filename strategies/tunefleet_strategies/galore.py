"""GaLore: every weight trains, and the moments of the matrices live in a small subspace of their gradients.

What: AdamW on R = P^T G instead of G, its result projected back (Zhao et al., arXiv 2403.03507, algorithm 2). The
weights themselves stay of full rank, because the subspace moves on.
When: full tuning is wanted and its moments do not fit. `galore_layerwise` also saves the gradients.
Settings: `galore_rank` (16) and `galore_scale` (0.25) go together: the update of a matrix counts scale times, much like
alpha / rank of LoRA, so learning rates are larger than under full tuning. `galore_update_interval` (200) updates lie
between two refreshes of a basis; `galore_stagger` spreads them over the interval. `galore_proj_type` says which side
shrinks: `std` the shorter one. `galore_target` names modules; `all` is every linear map in the layers, and each fused
expert's matrix by itself. Embeddings, head, norms and biases follow the same rule without projection.
Formula: p <- (p - lr scale back(m / (sqrt(v) + eps)) sqrt(1 - b2^t) / (1 - b1^t)) (1 - lr wd). As in galore-torch,
eps is not bias-corrected and decay comes last: unlike torch's AdamW, which `full` uses.
Bytes of optimizer state for a matrix of m x n entries of q bytes, r = min(galore_rank, m, n), moments in fp32:

    right side (std with m >= n)     q r n + 8 m r          AdamW 8 m n
    left side (std with m < n)       q r m + 8 r n          and under `pure_bf16` 4 m n
    full                             q r (m + n) + 8 r r
    not projected                    8 m n

4096 x 4096 in bf16 at rank 128: 5 MiB instead of 128 MiB. Gradients are those of full tuning, q m n each; layerwise
only the largest single one lives.
Refresh: `subspace` is the default: on the gradients of the quickstart's model it captures 0.9996 of the exact basis'
energy on average in a fourteenth of the time of `svd`, and losses agree (docs/methods/galore.md,
benchmarks/galore_refresh.py). Below 0.99 of the exact energy it falls back to the exact basis, with a notice.
Traps: an expert, or a module, without a single token in the update that refreshes it gets an arbitrary basis until the
next one. Fewer target tokens than `galore_rank` leave basis vectors that are noise. GPT-2 keeps its matrices
transposed, so `left` and `right` change places there. Layerwise: one worker, one micro-batch, no clipping.
`optimizer_backend: upstream` runs galore-torch itself, whose state cannot be saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

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
from tunefleet_strategies.fields import ALL, BACKEND_WORDS, Names, OptimizerBackend
from tunefleet_strategies.optim.carrying import resized_subspace
from tunefleet_strategies.optim.draws import generator_of
from tunefleet_strategies.optim.galore import Behaviour, GaLoreAdamW
from tunefleet_strategies.optim.groups import Group, Owned, Rate, grouped, trainable
from tunefleet_strategies.optim.projection import Projection, Refresh, kept_entries
from tunefleet_strategies.optim.rounding import Rounding
from tunefleet_strategies.optim.upstream_galore import check_upstream, upstream_optimizer
from tunefleet_strategies.parts import Anatomy
from tunefleet_strategies.targets import anatomy, matrices_within
from tunefleet_strategies.weights import hold, low_precision_notices, save_whole_model

_MOMENT_BYTES = 4
"""Moments are fp32 whatever the weight is: in bf16, 0.999 v rounds back to v."""

_NATIVE_ONLY: Mapping[str, object] = {"galore_refresh": "svd", "galore_stagger": False, "bf16_rounding": "nearest"}
"""Arguments that galore-torch does not know, and the values that describe what it does."""


class GaLore(Strategy):
    """Train every parameter; keep the moments of the matrices in a subspace."""

    name: ClassVar[str] = "galore"
    summary: ClassVar[str] = "every parameter trains, the moments live in a subspace of the gradients"
    selector: ClassVar[Mapping[str, object]] = {"finetuning_type": "full", "use_galore": True}
    forms: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "galore_layerwise: true": {"galore_layerwise": True},
        "optimizer_backend: upstream": {"optimizer_backend": "upstream"},
    }

    galore_target: Names = Field(
        default=(ALL,),
        description="Modules whose matrices are projected: `all` (every linear map in the layers) or names such as "
        "mlp, self_attn, q_proj.",
    )
    galore_rank: int = Field(default=16, ge=1, description="Rank of the subspace that holds a matrix' moments.")
    galore_update_interval: int = Field(default=200, ge=1, description="Updates between two refreshes of a basis.")
    galore_scale: float = Field(default=0.25, gt=0, description="The update of a projected matrix counts so much.")
    galore_proj_type: Projection = Field(
        default="std", description="Which side of a matrix shrinks to the rank: std the shorter, full both."
    )
    galore_layerwise: bool = Field(
        default=False,
        description="Update each parameter during the backward pass and free its gradient: one worker, no clipping.",
    )
    galore_refresh: Refresh = Field(
        default="subspace",
        description="How a basis is found: svd as galore-torch does, eigh the same subspace faster, subspace one "
        "warm-started iteration with the exact basis to fall back on.",
    )
    galore_stagger: bool = Field(
        default=False, description="Spread the refreshes evenly over the interval instead of making all at once."
    )
    bf16_rounding: Rounding = Field(
        default="nearest",
        description="How weights held in bf16 take an update: nearest, or stochastic, which keeps small ones on "
        "average.",
    )
    optimizer_backend: OptimizerBackend = Field(default="native", description=BACKEND_WORDS)

    @model_validator(mode="before")
    @classmethod
    def _upstream_defaults(cls, data: object) -> object:
        """Under `upstream`, what is left out means what galore-torch does."""
        if not isinstance(data, Mapping) or data.get("optimizer_backend") != "upstream":
            return data
        return {**data, **{key: value for key, value in _NATIVE_ONLY.items() if data.get(key) is None}}

    @model_validator(mode="after")
    def _upstream_cannot(self) -> GaLore:
        if self.optimizer_backend == "native":
            return self
        if self.galore_layerwise:
            raise ValueError(
                "galore_layerwise is built natively only, and optimizer_backend is upstream; write "
                "optimizer_backend: native"
            )
        for key, value in _NATIVE_ONLY.items():
            if self.model_dump()[key] != value:
                raise ValueError(
                    f"{key} is unknown to galore-torch, and optimizer_backend is upstream; write optimizer_backend: "
                    f"native, or drop {key}"
                )
        return self

    def traits(self) -> Traits:
        """Plain data parallelism; layerwise one worker and one backward pass; upstream one worker and no resume.

        galore-torch decomposes on every worker by itself, which is equal only where their arithmetic is.
        """
        if self.optimizer_backend == "upstream":
            upstream = "optimizer_backend: upstream"
            return Traits(max_workers=1, resumable=False, limited_by=upstream, optimizers=ADAMW | {"adamw_8bit"})
        if self.galore_layerwise:
            layerwise = "galore_layerwise: true"
            return Traits(max_workers=1, accumulation=False, clipping=False, limited_by=layerwise, optimizers=ADAMW)
        return Traits(optimizers=ADAMW)

    def attach(self, model: nn.Module, context: AttachContext) -> nn.Module:
        """Make every parameter trainable.

        Raises:
            StrategyError: a target matches nothing, or the number format or the package does not allow it.
        """
        if self.galore_layerwise and context.precision.compute == torch.float16:
            raise StrategyError(
                "galore_layerwise uses gradients before an fp16 loss scale can be taken out of them; write bf16: true "
                "instead of fp16, or galore_layerwise: false"
            )
        projected = self._projected(model)
        if self.optimizer_backend == "upstream":
            check_upstream(self.galore_proj_type, self.galore_rank, projected)
        model.requires_grad_(True)
        hold(model, context.precision)
        return model

    def notices(self, model: nn.Module, updates: int | None = None, seed: int | None = None) -> list[str]:
        """Say what was cut or left as it is, and what half-precision weights without a master copy cost."""
        upstream = self.optimizer_backend == "upstream"
        told = low_precision_notices(model, moments=upstream) if self.bf16_rounding == "nearest" else []
        if self.bf16_rounding == "stochastic" and not any(p.dtype == torch.bfloat16 for p in model.parameters()):
            told.append("bf16_rounding: stochastic does nothing, because no weight is held in bf16; see pure_bf16")
        if "galore_scale" not in self.model_fields_set:
            told.append(
                f"galore_scale is left out and {self.galore_scale:g}, as documented; LLaMA-Factory's own default is 2.0"
            )
        told += self._cut(model)
        if upstream and anatomy(model).fused:
            told.append("galore-torch projects matrices only, so fused expert tensors train without projection")
        if updates is not None and 1 < updates <= self.galore_update_interval:
            told.append(
                f"galore_update_interval {self.galore_update_interval} is not reached in {updates} updates: every "
                "basis stays the first one"
            )
        return told

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """GaLore's AdamW over everything; norms and biases are not decayed.

        Raises:
            StrategyError: the optimizer that the recipe asks for has no projected form.
        """
        self.refuse_optimizer(spec.name)
        groups = self._groups(model, spec)
        if self.optimizer_backend == "upstream":
            return upstream_optimizer(groups, spec)
        behaviour = Behaviour(self.galore_refresh, self.galore_stagger, self.bf16_rounding, self.galore_layerwise)
        return GaLoreAdamW(groups, spec, behaviour)

    def _groups(self, model: nn.Module, spec: OptimizerSpec) -> list[Group]:
        """Parameter groups; those of projected matrices say how."""
        projected = {id(parameter) for parameter in self._projected(model).values()}

        def rate(owned: Owned) -> Rate:
            return Rate("galore" if id(owned.parameter) in projected else "base", spec.learning_rate)

        groups = grouped(trainable(model), spec, rate)
        for group in groups:
            if str(group["name"]).startswith("galore"):
                group["rank"], group["scale"] = self.galore_rank, self.galore_scale
                group["projection"], group["update_interval"] = self.galore_proj_type, self.galore_update_interval
        return groups

    def _paths(self, parts: Anatomy) -> tuple[str, ...]:
        """Paths of the parameters that are projected."""
        paths = matrices_within(parts, self.galore_target, "galore_target")
        if self.optimizer_backend == "upstream":
            paths = tuple(path for path in paths if path not in parts.fused)
        return paths

    def _projected(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters that are projected, by path."""
        return {path: model.get_parameter(path) for path in self._paths(anatomy(model))}

    def _cut(self, model: nn.Module) -> list[str]:
        """A notice that names the matrices whose smaller side is below the rank."""
        cut: list[str] = []
        for path, parameter in self._projected(model).items():
            smaller = min(parameter.shape[-2:])
            if smaller < self.galore_rank:
                cut.append(f"{path.removesuffix('.weight').rsplit('.', 1)[-1]} ({smaller})")
        if not cut:
            return []
        named = ", ".join(f"{cut.count(name)} x {name}" for name in dict.fromkeys(cut))
        return [
            f"galore_rank {self.galore_rank} is more than the smaller side of some matrices, which take it: {named}"
        ]

    def footprint(self, shape: ModelShape, precision: Precision) -> Footprint:
        """All weights and gradients (layerwise: the largest one), and state as the card at the top says.

        Raises:
            StrategyError: the layers of the model cannot be told apart.
        """
        if shape.anatomy is None:
            raise StrategyError("galore finds no layers in this model; use finetuning_type: full without use_galore")
        projected, dtype = set(self._paths(shape.anatomy)), precision.trainable
        counts = [parameter.numel for parameter in shape.parameters]
        return Footprint(
            weights=dtype.itemsize * sum(counts),
            gradients=dtype.itemsize * (max(counts) if self.galore_layerwise else sum(counts)),
            optimizer_state=sum(
                self._state_bytes(parameter, parameter.name in projected, dtype) for parameter in shape.parameters
            ),
        )

    def _state_bytes(self, parameter: ParameterShape, projected: bool, dtype: torch.dtype) -> int:
        """Basis and moments of one parameter."""
        upstream = self.optimizer_backend == "upstream"
        moment_bytes = dtype.itemsize if upstream else _MOMENT_BYTES
        if not projected:
            return 2 * moment_bytes * parameter.numel
        kept = kept_entries(self.galore_proj_type, self.galore_rank, parameter.shape)
        # galore-torch keeps fp32 bases as views, so that the whole decomposition stays alive.
        whole = upstream and dtype == torch.float32
        basis = kept_entries(self.galore_proj_type, min(parameter.shape[-2:]), parameter.shape) if whole else kept
        return dtype.itemsize * basis.basis + 2 * moment_bytes * kept.moment

    def search_space(self) -> dict[str, Domain]:
        """Rank, scale and interval decide together with the learning rate."""
        return {
            "galore_rank": Choice((8, 16, 32, 64, 128)),
            "galore_scale": LogUniform(0.1, 4.0),
            "galore_update_interval": Choice((25, 50, 100, 200)),
            "learning_rate": LogUniform(1e-5, 1e-2),
        }

    def mutable(self) -> Mapping[str, str | None]:
        """Rank and interval, where the state can be saved at all."""
        why = "optimizer_backend: upstream cannot save its state" if self.optimizer_backend == "upstream" else None
        return {"galore_rank": why, "galore_update_interval": why}

    def carried(self, saved: Saved, now: Self, seed: int) -> Saved:
        """Cut or complete every basis, with its moments; refreshes follow the new interval."""
        state = dict(saved.optimizer["state"])
        groups = []
        for group in saved.optimizer["param_groups"]:
            if group["rank"] is None:
                groups.append(group)
                continue
            groups.append({**group, "rank": now.galore_rank, "update_interval": now.galore_update_interval})
            for number in group["params"] if now.galore_rank != self.galore_rank else ():
                if number in state:
                    generator = generator_of(seed, "basis", number, now.galore_rank)
                    state[number] = resized_subspace(state[number], now.galore_rank, generator)
        return Saved(saved.weights, {**saved.optimizer, "state": state, "param_groups": groups}, saved.numbered)

    def export(self, model: nn.Module, folder: Path, initial: Mapping[str, Tensor]) -> None:
        """Write the whole model in one number format, as `transformers` loads it."""
        save_whole_model(model, folder)
