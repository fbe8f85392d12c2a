"""One rank of a group of two, without Ray: trains every cell and writes what it saw. Run by test_one_equals_two."""

from __future__ import annotations

import sys
from typing import Any, get_args
from unittest.mock import patch

import torch
import torch.distributed as dist
from tests.contract.variants import SHARED, VARIANTS
from tests.group import end_rank
from tests.training.tiny import MemoryRows, Run, start

from tunefleet.training.checkpoint import fingerprints
from tunefleet.training.determinism import pin
from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.contract import OptimizerSpec, Strategy
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.optim.galore import Behaviour, GaLoreAdamW
from tunefleet_strategies.optim.groups import Group
from tunefleet_strategies.optim.projection import Projection, find_basis

LONG, SHORT = 40, 8
"""Updates of a cell. Two cells are followed for long; what differs between workers shows in the first few."""
GLOBAL_BATCH = 5
"""Odd, so that the shares of two workers differ."""
ONE_ROW = "one row"
"""A cell whose global batches are a single row, so that the second rank never has a sample."""
REFUSAL = "refusal"
"""A cell that cannot be: what it was refused with."""
PROJECTIONS: dict[str, Strategy] = {
    f"galore_{kind}": GaLore(galore_rank=2, galore_update_interval=3, galore_scale=1.0, galore_proj_type=kind)
    for kind in get_args(Projection)
}
"""Cells of one architecture, at the epsilon under which the two sums may be compared at all."""
EPSILON = 1e-6
"""Where a gradient is zero but for rounding (the bias of keys, which softmax does not see), Adam's default 1e-8 blows
the rounding up to a full step, on one worker as on two; nothing can agree there."""


def train_cell(variant: str, architecture: str, global_batch: int = GLOBAL_BATCH) -> dict[str, Any]:
    """Train one cell on however many ranks there are."""
    # The last batch of each epoch is short. An expert sees a part of the tokens only, and GaLore's basis is noise where
    # there are fewer of them than its rank (then two workers, who add up in another order, find another one).
    rows = MemoryRows(count=23, longest=60 if architecture == "qwen3_moe" else 20)
    run = start(
        {**VARIANTS, **PROJECTIONS}[variant],
        architecture,
        rows=rows,
        updates=LONG if architecture == "llama" and variant in ("full", "lora") else SHORT,
        global_batch=global_batch,
        micro_batch=2 if architecture == "llama" else 3,
        epsilon=epsilon(variant),
    )
    losses, norms, hashes = [], [], []
    sent, trainable = [], [trainable_entries(run)]
    before = run.engine.bytes_sent
    for step in run.steps():
        sent.append(run.engine.bytes_sent - before)
        trainable.append(trainable_entries(run))
        losses.append(step.loss)
        norms.append(step.grad_norm)
        hashes.append(fingerprints(run.state)["weights"])
        before = run.engine.bytes_sent  # the hashes have sent something too
    return {
        "losses": losses,
        "norms": norms,
        "hashes": hashes,
        "moved": run.moved(),
        "tokens": sum(run.feed.seen),
        "bytes": run.engine.bytes_sent,
        "sent": sent,
        "trainable": trainable[:-1],
        "entries": sum(parameter.numel() for parameter in run.model.parameters()),
    }


def trainable_entries(run: Run) -> int:
    """Of everything that the coming update may change."""
    return sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)


def epsilon(variant: str) -> float:
    """The default for one-sided projections; under `full` the off-diagonal of R is rounding noise at a refresh."""
    if variant not in PROJECTIONS:
        return EPSILON
    return 1e-3 if variant == "galore_full" else 1e-8


def refusal_of_ratio_mode() -> str:
    """What ratio mode of BAdam says to the world that there is; nothing to a world of one."""
    strategy = BAdam(badam_mode="ratio")
    try:
        start(strategy, "llama")
    except StrategyError as error:
        return str(error)
    return ""


def bases_of_different_gradients(rank: int) -> dict[str, torch.Tensor]:
    """What GaLore keeps where, against all rules, each rank has a gradient of its own. More than one broadcast."""
    generator = torch.Generator().manual_seed(rank)
    weights = [torch.zeros(6, 4), torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(2, 6, 4)]
    how: Group = {"params": weights, "rank": 2, "projection": "full", "update_interval": 2, "scale": 1.0}
    optimizer = GaLoreAdamW([how], OptimizerSpec("adamw_torch", 1e-3), Behaviour("subspace"))
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
    states = enumerate(optimizer.state[weight] for weight in weights)
    return {f"{number}/{side}": state[side] for number, state in states for side in ("left", "right")}


def counting_decompositions(rank: int) -> tuple[dict[str, torch.Tensor], int]:
    """The same, and how many bases this rank has looked for itself."""
    with patch("tunefleet_strategies.optim.galore.find_basis", wraps=find_basis) as counted:
        return bases_of_different_gradients(rank), counted.call_count


def main(rank: int, rendezvous: str, output: str) -> None:
    pin(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    results: dict[Any, Any] = {cell: train_cell(*cell) for cell in SHARED}
    results |= {(variant, "llama"): train_cell(variant, "llama") for variant in PROJECTIONS}
    results["full", ONE_ROW] = train_cell("full", "gpt2", global_batch=1)
    results["badam_ratio", REFUSAL] = refusal_of_ratio_mode()
    results["bases"], results["decompositions"] = counting_decompositions(rank)
    torch.save(results, output)
    end_rank()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
