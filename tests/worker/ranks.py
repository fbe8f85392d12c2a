"""One of two ranks, without Ray, that save and find a checkpoint together. Run by test_saving.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from tests.group import end_rank

from tunefleet.artifacts.folder import RunFolder
from tunefleet.storage import Place, place
from tunefleet.worker.saving import store
from tunefleet.worker.seat import Seat
from tunefleet.worker.start import found_start


def attempted(work: Any) -> str:
    """What `work` raised, else nothing."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def part(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    seat = Seat(rank, 2, torch.device("cpu"), local_rank=rank)
    own = folder / f"rank{rank}"
    root = place(folder / "run")
    said: dict[str, Any] = {}

    store(root.child("checkpoints", "step_00000010"), part(own / "a", **{f"weights_{rank}": f"of {rank}"}), seat)
    clash = part(own / "b", weights="ours")
    said["clash"] = attempted(lambda: store(root.child("checkpoints", "step_00000020"), clash, seat))
    gone = own / "gone" if rank == 1 else own / "a"
    said["fails"] = attempted(lambda: store(root.child("checkpoints", "step_00000030"), gone, seat))
    elsewhere = place(own / "own_disk" / "step_00000040")
    Path(elsewhere.path).parent.mkdir(parents=True)
    said["not shared"] = attempted(lambda: store(elsewhere, own / "a", seat))

    run: Any = SimpleNamespace(resume_from_checkpoint=None)
    plan: Any = SimpleNamespace(
        resumable=True, recipe=SimpleNamespace(run=run), place=SimpleNamespace(root=str(folder))
    )
    for kind, base in (("local", root), ("remote", Place(SubTreeFileSystem(str(folder), LocalFileSystem()), "run"))):
        job: Any = SimpleNamespace(plan=plan, folder=RunFolder(base))
        with found_start(job, seat) as start:
            assert start.folder is not None
            said[kind] = {
                "folder": str(start.folder),
                "files": {file.name: file.read_text() for file in sorted(start.folder.iterdir())},
            }
            dist.barrier()
        dist.barrier()
        said[kind]["left"] = start.folder.exists()
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    end_rank()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
