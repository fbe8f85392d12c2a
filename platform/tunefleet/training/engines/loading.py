"""A model whose weights stay in files until each rank reads its own rows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefleet.errors import Refused
from tunefleet.model_settings import ModelSettings
from tunefleet.models import empty_model, model_shape
from tunefleet.training.activations import checkpoint_activations
from tunefleet.training.engines.fsdp import replace_parameter
from tunefleet.training.engines.sharding import fill, shard
from tunefleet.weight_files import WeightFiles
from tunefleet_strategies.contract import AttachContext, ModelShape, Precision, Strategy
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.targets import anatomy


@dataclass(frozen=True)
class Source:
    """A model with its method, of which only the shapes are in memory; its weights lie in files."""

    settings: ModelSettings
    files: WeightFiles
    method: Strategy
    context: AttachContext
    dtype: torch.dtype
    """What transformers would load the base in."""
    shape: ModelShape
    made: Mapping[str, Tensor]
    """Start values that the method makes, whole: adapters. Everything else is in the files."""

    @classmethod
    def open(cls, settings: ModelSettings, method: Strategy, context: AttachContext) -> Source:
        """
        Raises:
            Refused, StrategyError: model and method do not go together, or the weights cannot be read in parts.
        """
        files = WeightFiles(settings)
        bare = empty_model(settings, files.dtype)
        files.fit(bare)
        dtype = next(bare.parameters()).dtype
        made = _made(empty_model(settings, files.dtype), method, context, files, dtype)
        return cls(settings, files, method, context, dtype, model_shape(method.attach(bare, context)), made)

    def shell(self) -> nn.Module:
        """The attached model with its parameters on the meta device."""
        return self.method.attach(empty_model(self.settings, self.files.dtype), self.context)

    def sharded(self, device: torch.device, *, checkpointed: bool) -> nn.Module:
        """The attached model, shared out over the ranks and filled."""
        bare = empty_model(self.settings, self.files.dtype)
        layers = _layers(bare)
        model = self.method.attach(bare, self.context)
        if checkpointed:
            checkpoint_activations(model)
        shard(model, layers, self.context.precision, device)
        fill(model, self.rows, device)
        for name, buffer in model.named_buffers():
            stored = self.files.get(self.method.base_name(name))
            if stored is not None:
                buffer.copy_(stored)
        return model

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter as it is when the run begins."""
        if name in self.made:
            return self.made[name][start:stop]
        return self.files.rows(self.method.base_name(name), start, stop).to(self.dtype)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    try:
        return [model.get_submodule(path) for path in anatomy(model).layers]
    except StrategyError as error:
        raise Refused(
            f"{type(model).__name__} keeps its layers in no nn.ModuleList, so FSDP2 cannot gather it layer by layer: "
            "write sharding: none."
        ) from error


def _made(
    base: PreTrainedModel, method: Strategy, context: AttachContext, files: WeightFiles, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the method makes of its own, drawn exactly as on a model in memory.

    The base's weights are a nan each, spread over their shapes, so that they take no memory and that whatever is a copy
    of one, or computed from one, can be told.
    """
    for name, parameter in list(base.named_parameters()):
        replace_parameter(base, name, torch.full((), float("nan"), dtype=dtype).expand(parameter.shape))
    absent = {id(parameter) for parameter in base.parameters()}
    attached = method.attach(base, replace(context, precision=Precision(dtype, dtype, dtype)))
    method.complete(attached, lambda name: files.rows(name, 0, None).to(dtype))
    own = {name: p.detach() for name, p in attached.named_parameters() if id(p) not in absent}
    return {name: value for name, value in own.items() if not torch.isnan(value).any()}
