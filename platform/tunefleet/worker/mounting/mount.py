"""Which way of mounting goes with which engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from tunefleet.plan import Plan
from tunefleet.worker.mounting.fsdp import mount_fsdp
from tunefleet.worker.mounting.mounted import Mounted
from tunefleet.worker.mounting.plain import mount_plain
from tunefleet.worker.mounting.zero import mount_zero
from tunefleet.worker.seat import Seat
from tunefleet_strategies.contract import Sharding

Mount = Callable[[Plan, Seat, Mapping[str, Tensor] | None], Mounted]

MOUNTS: Mapping[Sharding | None, Mount] = {
    None: mount_plain,
    "zero0": mount_plain,  # stage 0 shares nothing out: plain data parallelism is what it is
    "zero1": mount_zero,
    "zero2": mount_zero,
    "zero3": mount_zero,
    "fsdp2": mount_fsdp,
}


def mount(plan: Plan, seat: Seat, initial: Mapping[str, Tensor] | None) -> Mounted:
    """Load the model, attach the method, build the optimizer. Collective.

    Args:
        initial: what the method kept of the run's first moment; None where that is now.

    Raises:
        Refused, StrategyError: model and method do not go together.
    """
    return MOUNTS[plan.sharding](plan, seat, initial)
