"""Freeze tuning: some layers train, everything else stays as it is.

What: the chosen layers (or chosen parts of them) and, if named, modules outside the layers train; all else is frozen.
When: full tuning does not fit, or only the upper layers should move. Gradients stop at the lowest layer that trains,
so a frozen prefix costs a forward pass only.
Settings: `freeze_trainable_layers` (2: the last two; -2: the first two; more than there are: all),
`freeze_trainable_layer_ids` ([3, 7]: exactly these, counted from 0), `freeze_trainable_modules` (`all`, or names of
first level inside a layer such as `self_attn`), `freeze_extra_modules` (exact names outside the layers).
Formula: AdamW on the subset, theta_S <- theta_S - lr AdamW(grad_S); the idea is as old as fine-tuning itself
(Howard & Ruder, arXiv 1801.06146, section 3.3, unfreeze from the top).
Bytes, F frozen and N trained parameters: w F + (4 + 4 + 8) N with fp32 weights that train, w = 2 under bf16.
Traps: layers are counted in the module tree, so experts are never taken for layers; `norm` is the final norm, not
every norm; with tied embeddings the head is the embedding and is named so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

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
    Strategy,
    Traits,
)
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.fields import ALL, Names, OptionalNames, OptionalNumbers
from tunefleet_strategies.footprints import adam_footprint
from tunefleet_strategies.optim.build import optimizer_over
from tunefleet_strategies.parts import Anatomy
from tunefleet_strategies.targets import anatomy, outside_modules, unknown_target
from tunefleet_strategies.weights import hold, low_precision_notices, save_whole_model


class Freeze(Strategy):
    """Train chosen layers and keep the rest frozen."""

    name: ClassVar[str] = "freeze"
    summary: ClassVar[str] = "chosen layers train, everything else is frozen"
    selector: ClassVar[Mapping[str, object]] = {"finetuning_type": "freeze"}

    freeze_trainable_layers: int | None = Field(
        default=2, description="How many layers train: n > 0 the last n, n < 0 the first |n|; null where ids are given."
    )
    freeze_trainable_modules: Names = Field(
        default=(ALL,),
        description="Parts of those layers that train: `all`, or names of first level such as self_attn, mlp.",
    )
    freeze_extra_modules: OptionalNames = Field(
        default=None, description="Modules outside the layers that train too, such as embed_tokens, norm, lm_head."
    )
    freeze_trainable_layer_ids: OptionalNumbers = Field(
        default=None, description="Exactly these layers train, counted from 0; instead of freeze_trainable_layers."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_way_to_choose(cls, data: object) -> object:
        """Ids replace the count: a count that was only defaulted gives way, a written one clashes."""
        if not isinstance(data, Mapping) or data.get("freeze_trainable_layer_ids") is None:
            return data
        if data.get("freeze_trainable_layers") is not None:
            raise ValueError(
                "freeze_trainable_layers and freeze_trainable_layer_ids both choose layers; keep one of them"
            )
        return {**data, "freeze_trainable_layers": None}

    @model_validator(mode="after")
    def _some_layer(self) -> Freeze:
        ids = self.freeze_trainable_layer_ids
        if ids is None and self.freeze_trainable_layers is None:
            raise ValueError("freeze_trainable_layers is null and no ids are given; write a count such as 2")
        if self.freeze_trainable_layers == 0:
            raise ValueError("freeze_trainable_layers: 0 trains no layer; write n for the last n or -n for the first n")
        if ids is not None and min(ids) < 0:
            raise ValueError(f"freeze_trainable_layer_ids: {min(ids)} is no layer; count layers from 0")
        if ids is not None and len(set(ids)) < len(ids):
            raise ValueError("freeze_trainable_layer_ids: a layer stands twice; write each layer once")
        return self

    def traits(self) -> Traits:
        """Any number of workers, any sharding."""
        return Traits(shardings=frozenset({"zero0", "zero1", "zero2", "zero3", "fsdp2"}))

    def attach(self, model: nn.Module, context: AttachContext) -> nn.Module:
        """Freeze all, then make the chosen parts trainable.

        Raises:
            StrategyError: a name or a layer number does not exist in the model.
        """
        chosen = self._trained_paths(model, anatomy(model))
        model.requires_grad_(False)
        for path in chosen:
            model.get_submodule(path).requires_grad_(True)
        hold(model, context.precision)
        return model

    def notices(self, model: nn.Module, updates: int | None = None, seed: int | None = None) -> list[str]:
        """Say what half-precision weights without a master copy cost."""
        return low_precision_notices(model)

    def _trained_paths(self, model: nn.Module, parts: Anatomy) -> tuple[str, ...]:
        """Paths of the modules that train."""
        layers = self._layer_paths(parts)
        extra = outside_modules(parts, self.freeze_extra_modules or (), "freeze_extra_modules")
        if self.freeze_trainable_modules == (ALL,):
            return (*layers, *extra)
        first_level = dict.fromkeys(
            name
            for layer in parts.layers
            for name, module in model.get_submodule(layer).named_children()
            if any(True for _ in module.parameters())
        )
        for name in self.freeze_trainable_modules:
            if name not in first_level:
                raise unknown_target("freeze_trainable_modules", name, (ALL, *first_level), "first-level part")
        # Layers of a hybrid model differ, so a part need not stand in every layer, only in one that trains.
        chosen = [
            f"{layer}.{name}"
            for layer in layers
            for name in self.freeze_trainable_modules
            if name in dict(model.get_submodule(layer).named_children())
        ]
        if not chosen:
            raise StrategyError(
                f"freeze_trainable_modules: none of the chosen layers has {', '.join(self.freeze_trainable_modules)}; "
                "choose other layers or `all`"
            )
        return (*chosen, *extra)

    def _layer_paths(self, parts: Anatomy) -> tuple[str, ...]:
        """Paths of the layers that train, wholly or in part."""
        if self.freeze_trainable_layer_ids is not None:
            last = len(parts.layers) - 1
            if max(self.freeze_trainable_layer_ids) > last:
                raise StrategyError(
                    f"freeze_trainable_layer_ids: {max(self.freeze_trainable_layer_ids)} is no layer of this model; "
                    f"choose from 0 to {last}"
                )
            return tuple(parts.layers[i] for i in sorted(self.freeze_trainable_layer_ids))
        count = self.freeze_trainable_layers
        if count is None:  # excluded by the validators; said again for the type checker
            raise StrategyError("freeze_trainable_layers is null; write a count such as 2")
        return parts.layers[-count:] if count > 0 else parts.layers[:-count]

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """AdamW or SGD over what trains; norms and biases are not decayed."""
        return optimizer_over(model, spec)

    def footprint(self, shape: ModelShape, precision: Precision) -> Footprint:
        """All weights, but gradients and moments only of what trains."""
        return adam_footprint(shape, precision)

    def search_space(self) -> dict[str, Domain]:
        """How many layers train, and how fast."""
        return {"freeze_trainable_layers": Choice((1, 2, 4, 8)), "learning_rate": LogUniform(1e-6, 1e-4)}

    def export(self, model: nn.Module, folder: Path, initial: Mapping[str, Tensor]) -> None:
        """Write the whole model in one number format, as `transformers` loads it."""
        save_whole_model(model, folder)
