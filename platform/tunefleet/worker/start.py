"""Where an attempt begins: at a checkpoint, or at the beginning."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tunefleet.checkpoints import newest_complete
from tunefleet.errors import Refused
from tunefleet.storage import Place, place
from tunefleet.training.checkpoint import load_initial
from tunefleet.worker.job import Job
from tunefleet.worker.seat import Seat
from tunefleet.worker.shared import SharedStart


@dataclass(frozen=True)
class Start:
    """The checkpoint that an attempt goes on from."""

    folder: Path | None = None
    """Its copy on this machine; None = the run begins."""
    is_own: bool = True
    """Whether this very run wrote it, so that the record up to it stands."""
    notices: tuple[str, ...] = ()
    shared: SharedStart | None = None
    """What trials begin from alike, where the run begins and is one of them."""

    def initial(self) -> dict[str, Tensor] | None:
        """What the strategy kept of the run's first moment; None where that is now."""
        if self.folder is not None:
            return load_initial(self.folder)
        return None if self.shared is None else self.shared.read()


@dataclass(frozen=True)
class _Found:
    name: str | None
    """Of a checkpoint of this run, or the URI of another one."""
    is_own: bool = True
    notices: tuple[str, ...] = ()


@contextmanager
def found_start(job: Job, seat: Seat) -> Iterator[Start]:
    """The newest whole checkpoint of the run, else the one that the recipe names, for as long as the block lasts.

    Every rank goes on from what rank 0 found, and sees the files of all ranks: where they lie, or in one copy for each
    node. Collective; the block must be left together.

    Raises:
        Refused: the checkpoint that the recipe names is not whole.
    """
    found = seat.from_leader(lambda: _find(job))
    if found.name is None:
        shared = None if job.shared is None else SharedStart(job.shared, job.plan)
        yield Start(notices=found.notices, shared=shared)
        return
    checkpoint = job.folder.checkpoints.child(found.name) if found.is_own else place(found.name)
    if checkpoint.local_path is not None:
        yield Start(checkpoint.local_path, found.is_own, found.notices)
        return
    with ExitStack() as stack:  # on the node's first rank, which leaves the block when all have loaded
        yield Start(seat.from_node(lambda: _downloaded(checkpoint, stack)), found.is_own, found.notices)


def _downloaded(checkpoint: Place, stack: ExitStack) -> Path:
    """A copy of a checkpoint that lasts as long as `stack`."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunefleet-")))
    checkpoint.download(folder)
    return folder


def _find(job: Job) -> _Found:
    notices: list[str] = []
    if job.plan.resumable:
        # A local checkpoint is read where it lies; a remote one is hashed while it is downloaded.
        hashes = job.folder.checkpoints.local_path is not None
        newest, notices = newest_complete(job.folder.checkpoints, hashes=hashes)
        if newest is not None:
            return _Found(newest.name, True, tuple(notices))
    wish = job.plan.recipe.run.resume_from_checkpoint
    if isinstance(wish, str):
        return _Found(_named(wish, job).uri, False, tuple(notices))
    return _Found(None, True, tuple(notices))


def _named(wish: str, job: Job) -> Place:
    named = place(wish, base=Path(job.plan.place.root))
    problem = named.problem(hashes=named.local_path is not None)
    if problem is not None:
        raise Refused(f"resume_from_checkpoint {named.uri} is damaged ({problem}): name another checkpoint.")
    return named
