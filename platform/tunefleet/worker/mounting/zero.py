"""DeepSpeed ZeRO: under stage 3 the model is loaded in parts, so that no rank ever holds it whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from tunefleet.models import load_model, model_shape
from tunefleet.plan import Plan
from tunefleet.training.activations import checkpoint_activations
from tunefleet.training.checkpoint import RunState
from tunefleet.training.deepspeed_config import Config
from tunefleet.training.engines.zero import ZeroEngine, prepare_deepspeed
from tunefleet.training.engines.zero_shards import in_shape, is_shared_out, put_in_shape
from tunefleet.worker.mounting.mounted import Mounted, optimizer_spec
from tunefleet.worker.seat import Seat
from tunefleet_strategies.contract import AttachContext, ModelShape, Precision


def mount_zero(plan: Plan, seat: Seat, initial: Mapping[str, Tensor] | None) -> Mounted:
    """Load the model, in parts under stage 3, attach the method, and give both to DeepSpeed. Collective."""
    config, method = plan.deepspeed, plan.recipe.method
    assert config is not None  # the plan names this engine
    prepare_deepspeed()
    precision = held(plan)
    with _shared_out(config) if plan.sharding == "zero3" else nullcontext():
        model, optimizer, shape = seat.together(lambda: _attached(plan, seat, precision, initial))
    trained = frozenset(parameter.name for parameter in shape.parameters if parameter.trainable)
    kept = initial
    if kept is None and plan.sharding == "zero3":
        _broadcast_whole(model)
        kept = method.initial_state(model)  # while adapters are still whole
    exported = frozenset(p.name for p in shape.parameters) if method.traits().trains_base else trained
    engine = seat.together(lambda: ZeroEngine(model, optimizer, config, exported=exported))
    engine.start()
    if kept is None:
        kept = method.initial_state(model)
    return Mounted(RunState(engine, trained, kept), shape, precision)


def held(plan: Plan) -> Precision:
    """The number formats of the weights: 16 bits beside fp32 masters, or as planned where passes autocast."""
    planned = plan.precision.resolved()
    if not planned.autocast:
        return planned
    if plan.recipe.method.traits().in_turns:
        return Precision(planned.compute, planned.trainable, planned.trainable)
    return Precision(planned.compute, planned.compute, planned.compute)


def _attached(
    plan: Plan, seat: Seat, precision: Precision, initial: Mapping[str, Tensor] | None
) -> tuple[nn.Module, Optimizer, ModelShape]:
    recipe = plan.recipe
    context = AttachContext(precision, recipe.training.seed, seat.leads, initial, gather)
    dtype = precision.frozen if plan.sharding == "zero3" else None
    loaded = load_model(recipe.model, dtype, seat.device)
    with in_shape(loaded):
        model = recipe.method.attach(loaded, context)
    with in_shape(model):  # again, for PEFT parts what it has gathered
        shape = model_shape(model)  # before there is an optimizer, which may narrow what requires a gradient
        optimizer = recipe.method.optimizer(model, optimizer_spec(recipe.training))
    if recipe.training.checkpoints_activations:
        checkpoint_activations(model)
    return model, optimizer, shape


@contextmanager
def _shared_out(config: Config) -> Iterator[None]:
    """Let transformers and PEFT build every module in parts, and gather what they read."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    here = HfDeepSpeedConfig(config)  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del here


@contextmanager
def gather(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """`AttachContext.gather`: whole values inside; rank 0's are kept. Collective."""
    import deepspeed

    parted = [parameter for parameter in parameters if is_shared_out(parameter)]
    with deepspeed.zero.GatheredParameters(parted, modifier_rank=0):
        yield
    for parameter in parted:
        put_in_shape(parameter)


def _broadcast_whole(model: nn.Module) -> None:
    """Let what is not parted yet (adapters) be that of rank 0. Collective."""
    for parameter in model.parameters():
        if not is_shared_out(parameter):
            flat = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
            dist.broadcast(flat, src=0)
            parameter.detach().copy_(flat.view(parameter.dtype).view_as(parameter))
