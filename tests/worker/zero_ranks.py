"""One of several ranks, without Ray, that train under DeepSpeed what a file lists. Run by test_zero.py."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm.comm import comms_logger
from tests.group import end_rank
from tests.worker.alone import Gathered
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunefleet.artifacts.claim import claim_run
from tunefleet.artifacts.folder import RunFolder
from tunefleet.launch.cluster import local_shape
from tunefleet.launch.draft import draft
from tunefleet.launch.runs import open_run
from tunefleet.recipe.read import read_flat
from tunefleet.storage import place
from tunefleet.training.determinism import pin
from tunefleet.training.engines.zero import ZeroEngine
from tunefleet.training.engines.zero_shards import part_of, whole_shape
from tunefleet.worker.build import Trainee
from tunefleet.worker.events import Noticed, Stepped
from tunefleet.worker.job import Job
from tunefleet.worker.reporter import Reporter
from tunefleet.worker.run import attempt
from tunefleet.worker.seat import Seat


class Peak:
    """The most memory of its own (file pages apart) that this process had above what it had at the beginning, bytes."""

    def __init__(self) -> None:
        self.bytes, self._over, self._base = 0, threading.Event(), own_memory()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, own_memory() - self._base)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def own_memory() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


class Watching(Reporter):
    """A reporter that looks at the bytes that a rank keeps after each update, and at those that it sent for it.

    Also at what an update leaves of its gradients.
    """

    kept: list[dict[str, int]]
    sent: list[dict[str, int]]
    left: list[float]
    trainee: Trainee
    peak: Peak

    def open(self, trainee: Trainee, *rest: Any) -> Any:
        self.peak.stop()
        self.trainee, self.kept, self.sent, self.left = trainee, [], [], []
        opened = super().open(trainee, *rest)
        self._before = bytes_counted(trainee)
        return opened

    def stepped(self, *args: Any) -> None:
        counted = bytes_counted(self.trainee)
        sent = {name: number - self._before.get(name, 0) for name, number in counted.items()}
        self.sent.append({name: number for name, number in sent.items() if number})
        self.kept.append(bytes_kept(self.trainee))
        self.left.append(gradients_left(self.trainee))
        super().stepped(*args)
        self._before = bytes_counted(self.trainee)  # the figures of a line have been sent as well


def bytes_counted(trainee: Trainee) -> dict[str, int]:
    """Bytes that this rank has handed to collectives: as the engine counts, and by DeepSpeed's log of each kind."""
    logged = comms_logger.get_raw_data().items()
    kinds = {kind: sum(size * calls[0] for size, calls in sizes.items()) for kind, sizes in logged}
    return kinds | {"engine": trainee.engine.bytes_sent}


def gradients_left(trainee: Trainee) -> float:
    """The largest entry where ZeRO-3 adds gradients up, between two updates."""
    engine = trainee.engine
    if not isinstance(engine, ZeroEngine) or engine.stage < 3:
        return 0.0
    buffer: Tensor = engine._wrapped.grad_partitions_flat_buffer
    return float(buffer.abs().max())


def harm(folder: Path, how: dict[str, str]) -> None:
    """Flip a bit in the middle of a checkpoint's file; or make a copy where it is cut short, and sealed as if whole."""
    checkpoint = folder / how["checkpoint"]
    file = checkpoint / how["file"]
    content = bytearray(file.read_bytes())
    if "copy" in how:
        loose = folder / "loose"
        place(checkpoint).download(loose)
        (loose / how["file"]).write_bytes(content[: len(content) // 2])
        place(folder / how["copy"]).upload(loose)
        return
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def bytes_kept(trainee: Trainee) -> dict[str, int]:
    """Bytes of the model's parameters on this rank, of the whole model's, and of the optimizer's state."""
    parameters = list(trainee.model.parameters())
    own = storages(local_part(part_of(parameter)) for parameter in parameters)
    whole = storages(local_part(parameter.detach()) for parameter in parameters if parameter.numel())
    engine = trainee.engine
    state: dict[str, Any] = engine._optimizer_state() if isinstance(engine, ZeroEngine) else {"parts": []}
    tensors = [t for part in state["parts"] for t in part["state"].values() if isinstance(t, torch.Tensor)]
    return {
        "parameters": sum((own | whole).values()),
        "whole": sum(whole_shape(p).numel() * p.element_size() for p in parameters),
        "moments": sum(t.numel() * t.element_size() for t in tensors),
        "masters": sum(p["master"].numel() * p["master"].element_size() for p in state["parts"] if "master" in p),
    }


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows, where FSDP2 has shared a tensor out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The storages behind tensors, each once: its address and its bytes."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def run(keys: dict[str, Any], root: Path, seat: Seat, stop_at: int | None) -> dict[str, Any]:
    """Plan a recipe and train it. What this rank saw, or why it was refused."""
    try:
        recipe = read_flat(keys)
        plan = seat.from_leader(lambda: draft(recipe, local_shape(recipe.ray), root))
        folder = RunFolder(place(plan.place.storage_path, base=root).child(plan.place.run_name))
        notices = seat.from_leader(lambda: open_run(plan, folder))
        job = Job(plan, folder, "tunefleet train recipe.yaml", seat.from_leader(lambda: claim_run(folder.claim)))
        pin(1)
        told = Gathered(stop_at=stop_at)
        reporter = Watching(job, seat, told)
        gc.collect()
        reporter.peak = Peak()
        ending = attempt(job, seat, reporter, told)
    except Exception as error:
        if "TUNEFLEET_DEBUG" in os.environ:
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    steps = [event.step for event in told.events if isinstance(event, Stepped)]
    return {
        "losses": [step.loss for step in steps],
        "norms": [step.grad_norm for step in steps],
        "rates": [step.learning_rate for step in steps],
        "ending": ending,
        "kept": reporter.kept,
        "peak": reporter.peak.bytes,
        "planned": plan.model.model_dump(),
        "sent": reporter.sent,
        "left": reporter.left,
        "notices": [*notices, *plan.notices],
        "messages": [event.text for event in told.events if isinstance(event, Noticed)],
    }


def main(rank: int, world: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    seat = Seat(rank, world, torch.device("cpu"), local_rank=rank)
    for name, cell in json.loads((folder / "cells.json").read_text()).items():
        if "harm" in cell:
            seat.from_leader(partial(harm, folder, cell["harm"]))
        seen = run(cell["keys"], folder, seat, cell.get("stop_at"))
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen))
        if "error" in seen and rank == 0:
            print(name, seen["error"], flush=True)
    end_rank()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
