"""One rank of a group of two, without Ray, that makes a whole attempt; the second does more work than it should.

Run by test_pacing: rank, meeting point, plan, folder of the run and its mark, where to write what a driver is told.
"""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.group import end_rank
from tests.worker.alone import Gathered
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tunefleet.artifacts.folder import RunFolder
from tunefleet.plan import Plan
from tunefleet.storage import place
from tunefleet.training.determinism import pin
from tunefleet.worker.job import Job
from tunefleet.worker.reporter import Reporter
from tunefleet.worker.run import attempt
from tunefleet.worker.seat import Seat

EXTRA_SECONDS = 0.03


def work_more(module: nn.Module, arguments: Any) -> None:
    """Keep the processor busy before each layer, as a slower one would be."""
    if isinstance(module, LlamaDecoderLayer):
        end = time.perf_counter() + EXTRA_SECONDS
        while time.perf_counter() < end:
            torch.ones(64, 64) @ torch.ones(64, 64)


def main(rank: int, rendezvous: str, plan: str, run: str, mark: str, told: str) -> None:
    pin(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    if rank == 1:
        register_module_forward_pre_hook(work_more)
    job = Job(
        Plan.model_validate_json(Path(plan).read_text()), RunFolder(place(run)), "tunefleet train recipe.yaml", mark
    )
    seat = Seat(rank, 2, torch.device("cpu"))
    line = Gathered()
    attempt(job, seat, Reporter(job, seat, line), line)
    Path(told).write_bytes(pickle.dumps(line.events))
    end_rank()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
