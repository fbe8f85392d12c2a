"""LoRA and its family: low-rank factors beside frozen weights.

What: each target weight W (m x n) gets B (m x r) and A (r x n); the layer computes W x + s B A x and only A and B train
(Hu et al., arXiv 2106.09685, equation 3), s = alpha / r.
When: the usual first choice. A few megabytes per task, the base stays shared, and it merges into the base afterwards.
Settings: `lora_rank`, `lora_alpha` (unset: 2 r), `lora_dropout`, `lora_target` (`all` or names), `additional_target`
(whole modules that train and are saved too), `adapter_name_or_path` and `create_new_adapter` (several adapters in a
row: all but the last are merged and the last is trained further, or all are merged and a new one is made).
Members of the family, each one switch:
- LoRA+ (`loraplus_lr_ratio`; Hayou et al., arXiv 2402.12354): B learns at lr * ratio; LoRA on embeddings learns at
  `loraplus_lr_embedding`; everything else at lr.
- rsLoRA (`use_rslora`; Kalajdzievski, arXiv 2312.03732, theorem 3.2): s = alpha / sqrt(r).
- DoRA (`use_dora`; Liu et al., arXiv 2402.09353, equation 5): W' = m (W + s B A) / ||W + s B A||, m trains too.
- PiSSA (`pissa_init`; Meng et al., arXiv 2404.02948, equations 2 to 4): A and B start as the principal part of W, and
  the residual W - s B0 A0 is what is frozen. `pissa_iter` is the count of power iterations, -1 the exact SVD.
  The exported adapter is always the converted one, [A; A0] and [B | -B0] with rank 2 r, which fits the original base;
  `pissa_convert: false` keeps the trained factors (`pissa_adapter`) and the initial ones (`pissa_initial`) beside it.
Bytes, for each target: w m n + 16 r (m + n) with fp32 factors: weights, gradients and two moments (4 bytes each).
Traps: rsLoRA with alpha unset has s = 2 sqrt(r), which grows with the rank. An adapter trained on merged ones fits
only base plus those: `tunefleet_chain.json` beside it lists them. With PiSSA, dropout drops the principal part itself.
DoRA builds B A densely in each forward. Fused experts take plain LoRA without dropout, or stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet_strategies.contract import (
    AttachContext,
    Choice,
    Domain,
    Footprint,
    LogUniform,
    ModelShape,
    OptimizerSpec,
    Precision,
    Saved,
    Sharding,
    Strategy,
    Traits,
)
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.fields import ALL, Names, OptionalNames
from tunefleet_strategies.footprints import adam_footprint

if TYPE_CHECKING:
    from peft import PeftModel


class Lora(Strategy):
    """Train low-rank factors beside frozen weights."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank factors beside frozen weights (also LoRA+, rsLoRA, DoRA, PiSSA)"
    selector: ClassVar[Mapping[str, object]] = {"finetuning_type": "lora"}

    lora_rank: int = Field(default=8, ge=1, description="Rank r of the factors.")
    lora_alpha: int | None = Field(
        default=None,
        ge=0,
        description="Scale numerator: the product of the factors counts alpha / r times; unset or 0: 2 r.",
    )
    lora_dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="Share of the factors' inputs dropped in training."
    )
    lora_target: Names = Field(
        default=(ALL,),
        description="Modules that get factors: `all` (every linear map in the layers) or names such as q_proj.",
    )
    additional_target: OptionalNames = Field(
        default=None,
        description="Whole modules that train and are saved in the adapter, such as embed_tokens, lm_head.",
    )
    loraplus_lr_ratio: float | None = Field(
        default=None, gt=0.0, description="LoRA+: B learns at learning_rate times this."
    )
    loraplus_lr_embedding: float = Field(
        default=1e-6,
        ge=0.0,
        description="LoRA+: learning rate of LoRA on embeddings; used where loraplus_lr_ratio is set.",
    )
    use_rslora: bool = Field(default=False, description="rsLoRA: scale by alpha / sqrt(r) instead of alpha / r.")
    use_dora: bool = Field(
        default=False, description="DoRA: train the length of each weight row apart from its direction."
    )
    pissa_init: bool = Field(default=False, description="PiSSA: start from the principal part of the weights.")
    pissa_iter: int = Field(
        default=16, ge=-1, description="PiSSA: power iterations of the factorisation; -1 = exact SVD."
    )
    pissa_convert: bool = Field(
        default=False,
        description="PiSSA: write only the converted adapter, without the trained and the initial factors.",
    )
    create_new_adapter: bool = Field(
        default=False, description="Merge every adapter of adapter_name_or_path and train a new one."
    )
    adapter_name_or_path: OptionalNames = Field(
        default=None,
        description="Adapters to start from, in order: all but the last are merged, the last is trained further.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Lora:
        if self.pissa_convert and not self.pissa_init:
            raise ValueError("pissa_convert converts a PiSSA adapter and pissa_init is off; set pissa_init: true")
        if self.pissa_init and self.continued is not None:
            raise ValueError(
                "pissa_init makes a new adapter and adapter_name_or_path continues an old one; "
                "set create_new_adapter: true, or drop pissa_init"
            )
        return self

    @property
    def alpha(self) -> int:
        """The scale numerator; unset or 0 means twice the rank."""
        return self.lora_alpha or 2 * self.lora_rank

    @property
    def scale(self) -> float:
        """What the product of the factors counts: alpha / r, or alpha / sqrt(r) under rsLoRA."""
        return self.alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are merged into the base before training, in order."""
        adapters = self.adapter_name_or_path or ()
        return adapters if self.create_new_adapter else adapters[:-1]

    @property
    def continued(self) -> str | None:
        """The adapter that is trained further; None where a new one is made."""
        adapters = self.adapter_name_or_path or ()
        return adapters[-1] if adapters and not self.create_new_adapter else None

    def traits(self) -> Traits:
        """Any number of workers. What rewrites whole base weights at the start cannot have them sharded as it likes."""
        shardings: frozenset[Sharding] = frozenset({"zero0", "zero1", "zero2"})
        limit = None
        if self.merged:
            limit = "merged adapters in adapter_name_or_path"
        elif self.pissa_init:
            limit = "pissa_init: true"
            shardings |= {"zero3"}  # where it gathers one matrix at a time
        else:
            shardings |= {"zero3", "fsdp2"}
        return Traits(shardings=shardings, limited_by=limit, trains_base=False)

    def attach(self, model: nn.Module, context: AttachContext) -> nn.Module:
        """Merge earlier adapters, then put factors beside the targets; only they and additional modules train.

        Under autocast the model must run under autocast from now on: the factors take inputs in the compute format.

        Raises:
            StrategyError: a target matches nothing, an adapter cannot be read, or the architecture lacks what is asked.
        """
        # Here and below: PEFT loads for seconds, and reading a recipe needs none of it.
        from tunefleet_strategies.adapters import attach_adapter

        return attach_adapter(self, model, context)

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """PiSSA's A0 (r x n) and B0 (m x r) of every target, cloned; nothing for the others."""
        if not self.pissa_init:
            return {}
        from tunefleet_strategies.pissa import factors

        return {name: value.detach().clone() for name, value in factors(_adapted(model)).items()}

    def base_name(self, name: str) -> str:
        """The name without what PEFT puts around modules."""
        from tunefleet_strategies.adapters import bare_name

        return bare_name(name)

    def complete(self, model: nn.Module, weight: Callable[[str], Tensor]) -> None:
        """DoRA's magnitudes, the row lengths of the weights."""
        from tunefleet_strategies.adapters import measure_magnitudes

        if self.use_dora:
            measure_magnitudes(_adapted(model), weight)

    def notices(self, model: nn.Module, updates: int | None = None, seed: int | None = None) -> list[str]:
        """The scale of rsLoRA, what is not adapted, and settings that a continued adapter overrules."""
        from tunefleet_strategies.notices import lora_notices

        return lora_notices(self, _adapted(model))

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """AdamW or SGD; under LoRA+ with a learning rate for each kind of factor."""
        from tunefleet_strategies.optim.loraplus import lora_optimizer

        return lora_optimizer(_adapted(model), spec, self.loraplus_lr_ratio, self.loraplus_lr_embedding)

    def footprint(self, shape: ModelShape, precision: Precision) -> Footprint:
        """Frozen base, and weights, gradients and moments of the factors and additional modules."""
        return adam_footprint(shape, precision)

    def search_space(self) -> dict[str, Domain]:
        """Rank and learning rate.

        Raises:
            StrategyError: as `refuse_search`.
        """
        space: dict[str, Domain] = {"lora_rank": Choice((4, 8, 16, 32, 64)), "learning_rate": LogUniform(1e-5, 1e-3)}
        self.refuse_search(frozenset(space))
        return space

    def refuse_search(self, keys: frozenset[str]) -> None:
        """Refuse ranks with rsLoRA and an unset alpha, whose scale would grow with the rank that is searched.

        Raises:
            StrategyError: so it would.
        """
        if "lora_rank" in keys and self.use_rslora and not self.lora_alpha:
            raise StrategyError(
                "use_rslora with lora_alpha unset scales by 2 sqrt(rank), so a search over lora_rank would search two "
                "things at once; set lora_alpha"
            )

    def mutable(self) -> Mapping[str, str | None]:
        """The rank, unless the base or the adapter fix it."""
        if self.pissa_init:
            return {"lora_rank": "pissa_init made the base the rest of a factorisation of this rank"}
        if self.continued is not None:
            return {"lora_rank": "the adapter of adapter_name_or_path brings its own"}
        return {"lora_rank": None}

    def carried(self, saved: Saved, now: Self, seed: int) -> Saved:
        """Pad or cut every pair of factors, with their moments; see `optim/carrying.resized_factors`.

        Raises:
            StrategyError: the factors of fused experts, which lie in one tensor.
        """
        from tunefleet_strategies.factors import resized_adapter

        return resized_adapter(saved, self.lora_rank, now.lora_rank, self.scale / now.scale, seed)

    def export(self, model: nn.Module, folder: Path, initial: Mapping[str, Tensor]) -> None:
        """Write one adapter in PEFT format that fits the base (and the chain recorded beside it).

        Raises:
            StrategyError: PiSSA without the initial factors of its run.
        """
        from tunefleet_strategies.adapters import save_adapter, write_chain
        from tunefleet_strategies.pissa import save_converted

        adapted = _adapted(model)
        if self.pissa_init:
            save_converted(adapted, folder, initial, keep_factors=not self.pissa_convert)
        else:
            save_adapter(adapted, folder)
        write_chain(adapted, folder, self.merged)


def _adapted(model: nn.Module) -> PeftModel:
    """The model that `attach` returned.

    Raises:
        StrategyError: it is another one.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise StrategyError(f"{type(model).__name__} has no adapter; pass the model that attach returned")
    return model
