"""Which trials of a search are warm, and what their hosts start with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from tunefleet.errors import Refused
from tunefleet.launch.cluster import alive_nodes
from tunefleet.launch.placement import host_group, host_labels
from tunefleet.plan import Plan
from tunefleet.recipe.sections import RaySettings
from tunefleet.search.warm.forks import ForkServer, machine
from tunefleet.search.warm.host import WARM, Hosts

if TYPE_CHECKING:
    from tunefleet.search.trials import BranchPlan

COLD = "cold"


def why_cold(plan: Plan) -> str | None:
    """Why a trial needs workers that Ray Train starts; None where a host can take it."""
    if plan.workers.count > 1 or plan.workers.elastic:
        return f"{plan.workers.count} workers"
    if plan.sharding is not None:
        return f"sharding {plan.sharding}"
    return None


def host_keys(plan: Plan) -> dict[str, Any]:
    """What a trial's configuration says of its place: nothing where it is cold."""
    if why_cold(plan) is not None:
        return {}
    group = host_group(plan)
    place = {"bundles": [dict(bundle) for bundle in group.bundles], "strategy": group.strategy}
    return {WARM: {**place, **host_labels(plan)}}


def host_of(plan: Plan, workers: Sequence[int]) -> str:
    """How the trials of a branch are hosted, in words.

    Args:
        plan: of one of its points.
        workers: the numbers of workers that its points have.
    """
    if plan.sharding is not None or min(workers) > 1:
        return f"{COLD} ({why_cold(plan)})"
    return WARM if max(workers) == 1 else f"{WARM} on one worker, else {COLD}"


def refuse_all_cold(hosts: Sequence[str]) -> None:
    """See that a host would have something to do, where the search asks for warm ones.

    Args:
        hosts: how the trials of each branch are hosted.

    Raises:
        Refused: no trial could be warm.
    """
    if hosts and all(host.startswith(COLD) for host in hosts):
        raise Refused(
            f"tune.trial_host: warm is for trials of one worker without sharding, and no branch has any "
            f"({', '.join(dict.fromkeys(hosts))}): write ray_num_workers: 1 and no sharding, or remove trial_host."
        )


def hosts_of(branches: Sequence[BranchPlan], server: ForkServer | None) -> Hosts:
    """What hosts start with.

    Args:
        branches: of each, the plan of one of its points is what a fork server is made ready for.
        server: the driver's, which is told of them; None = it has none that hosts may use.

    Raises:
        Refused: no trial could be warm.
    """
    refuse_all_cold([str(branch.host) for branch in branches])
    stock = [branch.plan.model_dump(mode="json") for branch in branches]
    if server is None:
        return Hosts(stock)
    server.keep(stock)
    return Hosts(stock, server.address, machine())


def forks_here(settings: RaySettings, joins: bool) -> bool:
    """Whether hosts on this machine may use the driver's fork server, and there may be any.

    A runtime environment may bring packages of its own; its variables alone are handed on by the host. A cluster may
    have the driver on a node that gives no CPU to workers.
    """
    written = settings.ray_init_kwargs.get("runtime_env") or {}
    own = isinstance(written, dict) and written.keys() <= {"env_vars", "py_modules"}
    return own and (not joins or alive_nodes()[ray.get_runtime_context().get_node_id()].cpus > 0)
