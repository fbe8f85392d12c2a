"""The plain engine: every rank has the whole model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tunefleet.models import load_model, model_shape
from tunefleet.plan import Plan
from tunefleet.training.activations import checkpoint_activations
from tunefleet.training.checkpoint import RunState, trained_names
from tunefleet.training.engines.plain import PlainEngine
from tunefleet.worker.mounting.mounted import Mounted, optimizer_spec
from tunefleet.worker.seat import Seat
from tunefleet_strategies.contract import AttachContext, Precision


def mount_plain(plan: Plan, seat: Seat, initial: Mapping[str, Tensor] | None) -> Mounted:
    """Load the model whole, attach the method, build the optimizer. Arguments as in `mount`. Collective."""
    method, precision = plan.recipe.method, plan.precision.resolved()
    model = seat.together(lambda: _attached(plan, seat, precision, initial))
    trained = trained_names(model)  # before there is an optimizer, which may narrow what requires a gradient
    engine = seat.together(lambda: _plain(plan, model, precision))
    engine.start()
    return Mounted(
        RunState(engine, trained, method.initial_state(model) if initial is None else initial),
        model_shape(model),
        precision,
    )


def _attached(plan: Plan, seat: Seat, precision: Precision, initial: Mapping[str, Tensor] | None) -> nn.Module:
    recipe = plan.recipe
    context = AttachContext(precision, recipe.training.seed, is_source=seat.leads, initial=initial)
    model = recipe.method.attach(load_model(recipe.model, device=seat.device), context)
    if recipe.training.checkpoints_activations:
        checkpoint_activations(model)
    return model


def _plain(plan: Plan, model: nn.Module, precision: Precision) -> PlainEngine:
    method, training = plan.recipe.method, plan.recipe.training
    optimizer = method.optimizer(model, optimizer_spec(training))
    clips = method.traits().clipping
    return PlainEngine(model, optimizer, precision, max_grad_norm=training.max_grad_norm if clips else 0.0)
