"""One rank of a group of two under FSDP2, without Ray: trains every cell and writes what it saw. Run by test_fsdp."""

from __future__ import annotations

import gc
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.contract.pair import EPSILON, GLOBAL_BATCH
from tests.contract.sharded import ShardedRun, local_bytes, parameter_bytes, start_sharded, state_bytes
from tests.contract.variants import FSDP2, VARIANTS
from tests.group import end_rank
from tests.training.tiny import FP32, MIXED, PURE, MemoryRows
from torch import Tensor

from tunefleet.errors import Refused, RunFailed
from tunefleet.model_settings import ModelSettings
from tunefleet.models import empty_model
from tunefleet.training.checkpoint import fingerprints, load, save
from tunefleet.training.determinism import pin
from tunefleet.training.engines.loading import Source
from tunefleet.training.loop import evaluate, train
from tunefleet.training.loss import objective
from tunefleet.training.progress import Progress
from tunefleet.weight_files import WeightFiles
from tunefleet_strategies.contract import AttachContext
from tunefleet_strategies.full import Full

UPDATES, SAVED = 6, 3
"""Updates of a cell, and the one that another run goes on from."""
PRECISIONS = {"mixed": MIXED, "pure": PURE}

QUICK = [
    ("full", "llama"),
    ("full", "qwen2_tied"),
    ("full", "gpt2"),
    ("full", "qwen3_moe"),
    ("freeze", "llama"),
    ("lora", "llama"),
    ("lora", "qwen3_moe"),
    ("dora", "gpt2"),
    ("badam_layer", "qwen2_tied"),
]
"""What `make test` runs: every method, and every architecture."""
SLOW = [cell for cell in FSDP2 if cell not in QUICK]
LONG = [("full", "llama"), ("badam_layer", "llama")]
"""What is followed for as long as the rules of exactness ask for (E2)."""
LONG_UPDATES = 40
GROWN = [("full", "llama"), ("lora", "llama"), ("badam_layer", "qwen2_tied")]
"""What one rank begins, two go on with, and one ends."""
ALONE = 1
"""The update that the first of them saves behind: BAdam is in the middle of a visit here, and again at SAVED."""
BF16_QUICK = [("full", "mixed"), ("badam_layer", "pure")]
BF16_SLOW = [
    (variant, name)
    for variant in ("full", "lora", "dora", "badam_layer")
    for name in PRECISIONS
    if (variant, name) not in BF16_QUICK
]


def arguments(variant: str, architecture: str) -> dict[str, Any]:
    """What a cell trains on, here and on one plain worker."""
    # An expert sees a part of the tokens only; short rows would leave some without any.
    return {
        "rows": MemoryRows(count=23, longest=60 if architecture == "qwen3_moe" else 20),
        "updates": UPDATES,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": 2 if architecture == "llama" else 3,
        "epsilon": EPSILON,
    }


def train_cell(variant: str, architecture: str, folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """Train a cell on two ranks, once through and once interrupted, and export it."""

    def begin() -> ShardedRun:
        given = {**arguments(variant, architecture), **more}
        return start_sharded(VARIANTS[variant], folder / "models" / architecture, **given)

    checkpoint = folder / name
    checkpoint.mkdir(exist_ok=True)
    run = begin()
    seen: dict[str, Any] = {"losses": [], "norms": [], "hashes": [], "moments": [], "began": run.started, "sent": []}
    before = sending(run)
    for step in run.steps():
        seen["sent"].append(sent_since(before, run))
        seen["losses"].append(step.loss)
        seen["norms"].append(step.grad_norm)
        seen["hashes"].append(fingerprints(run.state))
        seen["moments"].append(state_bytes(run))
        if step.step == SAVED:
            save(checkpoint, run.state, Progress(step=SAVED))
            seen["saved"] = run.moved()
        before = sending(run)
    seen |= {"moved": run.moved(), "tokens": sum(run.feed.seen), "bytes": run.engine.bytes_sent}
    seen["parameters"] = parameter_bytes(run.engine.model)
    whole = run.engine.whole_model()
    if run.engine.rank == 0:
        (folder / f"{name}-export").mkdir()
        run.strategy.export(whole, folder / f"{name}-export", {})
    dist.barrier()
    again = begin()
    assert load(checkpoint, again.state).notices == ()
    seen["again"] = [(step.loss, fingerprints(again.state)) for step in again.steps(first=SAVED)]
    return seen


@dataclass(frozen=True)
class Sending:
    """Where a rank stands before an update."""

    active: tuple[str, ...]
    """What trains."""
    passes: int
    sent_bytes: int


def sending(run: ShardedRun) -> Sending:
    active = tuple(name for name, p in run.engine.model.named_parameters() if p.requires_grad)
    return Sending(active, len(run.feed.seen), run.engine.bytes_sent)


def sent_since(before: Sending, run: ShardedRun) -> dict[str, Any]:
    """What an update has sent, in how many passes, and what trained in it."""
    now = sending(run)
    sent = {"bytes": now.sent_bytes - before.sent_bytes, "passes": now.passes - before.passes}
    return {**sent, "active": list(before.active)}


def saved_alone(variant: str, architecture: str, folder: Path) -> Path:
    """Where the group of one leaves its checkpoint of a cell."""
    return folder / f"{variant}-{architecture}-alone"


def grow(variant: str, architecture: str, folder: Path) -> dict[str, Any]:
    """Go on with what one rank has begun, and save where one rank shall go on again."""
    run = start_sharded(VARIANTS[variant], folder / "models" / architecture, **arguments(variant, architecture))
    notices = load(saved_alone(variant, architecture, folder), run.state).notices
    began = run.moved().detach()
    losses = [step.loss for step in run.steps(first=ALONE, last=SAVED)]
    checkpoint = folder / f"{variant}-{architecture}-grown"
    checkpoint.mkdir(exist_ok=True)
    save(checkpoint, run.state, Progress(step=SAVED))
    return {"notices": list(notices), "began": began, "losses": losses, "saved": run.moved().detach()}


class WatchedFiles(WeightFiles):
    """Takes stock of what this process has in memory whenever something is read."""

    most = 0

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        found = super().rows(name, start, stop)
        # A slice is a view of the whole tensor's place in a file that is mapped: only what is asked for is ever read.
        self.most = max(self.most, live_bytes() - found.untyped_storage().nbytes() + found.nbytes)
        return found


def live_bytes() -> int:
    """Bytes of all storages that tensors of this process are on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [one for one in gc.get_objects() if isinstance(one, Tensor)]
    return local_bytes(one for one in tensors if one.device.type == "cpu")


def load_watched(folder: Path) -> dict[str, int]:
    """What was in memory at most while a model was loaded, above what had been before."""
    settings = ModelSettings(model_name_or_path=str(folder / "models" / "llama"))
    source = Source.open(settings, Full(), AttachContext(FP32))
    files = WatchedFiles(settings)
    files.fit(empty_model(settings, files.dtype))
    gc.collect()
    before = live_bytes()
    model = replace(source, files=files).sharded(torch.device("cpu"), checkpointed=False)
    return {"most": files.most - before, "kept": parameter_bytes(model)}


def agree(folder: Path, rank: int) -> dict[str, Any]:
    """What both ranks make of what only the second one knows: evaluation, the wish to stop, a gradient gone wrong."""
    run = start_sharded(Full(), folder / "models" / "llama", rows=MemoryRows(count=7))
    loss = objective(run.model, FP32, lockstep=True)
    random = torch.get_rng_state()
    seen: dict[str, Any] = {"evaluated": evaluate(run.engine, loss, run.feed)}
    assert torch.equal(torch.get_rng_state(), random)
    seen["stopped"] = [
        (step.step, step.stopped)
        for step in train(run.engine, loss, run.feed, run.batches, run.rate, should_stop=lambda: rank == 1)
    ]
    weights = fingerprints(run.state)["weights"]
    for parameter in run.engine.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan") if rank == 1 else 0.0)
    try:
        run.engine.update(torch.tensor(1.0), 3, step=9, stop=False)
    except RunFailed as error:
        seen["failed"] = str(error)
    seen["unmoved"] = fingerprints(run.state)["weights"] == weights
    try:
        run.engine.read_together(lambda: refused_on_the_second(rank))
    except Refused as error:
        seen["unread"] = str(error)
    return seen


def refused_on_the_second(rank: int) -> int:
    if rank == 1:
        raise Refused("The file is damaged.")
    return rank


def main(rank: int, folder: Path, share: str) -> None:
    pin(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for variant, architecture in QUICK if share == "quick" else SLOW:
        results[variant, architecture] = train_cell(variant, architecture, folder, f"{variant}-{architecture}")
    for variant, name in BF16_QUICK if share == "quick" else BF16_SLOW:
        more = {"precision": PRECISIONS[name]}
        results[variant, name] = train_cell(variant, "llama", folder, f"{variant}-{name}", **more)
    if share == "slow":
        results |= {
            ("long", *cell): train_cell(*cell, folder, f"long-{cell[0]}", updates=LONG_UPDATES) for cell in LONG
        }
    if share == "quick":
        results |= {("grown", *cell): grow(*cell, folder) for cell in GROWN}
        results["checkpointed"] = train_cell("lora", "llama", folder, "checkpointed", checkpointed=True)
        results["one row"] = train_cell("full", "gpt2", folder, "one-row", global_batch=1)
        results["loading"] = load_watched(folder)
        results["agreed"] = agree(folder, rank)
    torch.save(results, folder / f"{rank}.pt")
    end_rank()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
