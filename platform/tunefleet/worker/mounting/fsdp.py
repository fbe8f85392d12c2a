"""FSDP2: each rank reads its own rows of the weights, and no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tunefleet.plan import Plan
from tunefleet.training.checkpoint import RunState, trained_names
from tunefleet.training.engines.fsdp import FsdpEngine
from tunefleet.training.engines.loading import Source
from tunefleet.training.engines.sharding import settle
from tunefleet.worker.mounting.mounted import Mounted, optimizer_spec
from tunefleet.worker.seat import Seat
from tunefleet_strategies.contract import AttachContext


def mount_fsdp(plan: Plan, seat: Seat, initial: Mapping[str, Tensor] | None) -> Mounted:
    """Read this rank's rows, attach the method, build the optimizer. Arguments as in `mount`. Collective."""
    recipe, precision = plan.recipe, plan.precision.resolved()
    method, training = recipe.method, recipe.training
    context = AttachContext(precision, training.seed, is_source=seat.leads, initial=initial)
    source = seat.together(lambda: Source.open(recipe.model, method, context))
    model = seat.together(lambda: source.sharded(seat.device, checkpointed=training.checkpoints_activations))
    trained = trained_names(model)  # before there is an optimizer, which may narrow what requires a gradient
    settle(model, precision, seat.device)
    optimizer = seat.together(lambda: method.optimizer(model, optimizer_spec(training)))
    clips = method.traits().clipping
    engine = FsdpEngine(model, optimizer, max_grad_norm=training.max_grad_norm if clips else 0.0, shell=source.shell)
    engine.start()
    return Mounted(RunState(engine, trained, {} if initial is None else initial), source.shape, precision)
