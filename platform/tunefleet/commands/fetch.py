"""`tunefleet fetch`: what a run or search has left in its storage, brought to this machine."""

from __future__ import annotations

from pathlib import Path

from tunefleet.artifacts.folder import RunFolder
from tunefleet.errors import Refused
from tunefleet.launch.home import bring_home, refuse_output
from tunefleet.search.book import BOOK, Book
from tunefleet.search.result import bring_search_home
from tunefleet.storage import Place, place


def named(run: str, storage: str) -> Place:
    """A run by its name below a storage path, or by its own path or URI.

    Raises:
        Refused: there is nothing.
    """
    found = place(run) if "/" in run else place(storage).child(run)
    if not found.exists():
        where = "" if "/" in run else ", or name the storage path of its recipe with --storage"
        raise Refused(f"{found.uri} does not exist: see what is there with `tunefleet ps`{where}.")
    return found


def fetch(run: Place, to: Path, *, overwrite: bool) -> Path:
    """Copy model and record of a finished run, or what a finished search has found, to a folder; returns it.

    Raises:
        Refused: it is not finished, it is no run, or the folder holds files of something else.
        Damaged: what is stored is not what was written.
    """
    folder = RunFolder(run)
    is_search = run.child(BOOK).exists()
    if not is_search and not folder.record.exists():
        raise Refused(f"{run.uri} is no run and no search: see what is there with `tunefleet ps`.")
    if not (Book(run).complete if is_search else folder.finished()):
        kind, command = ("search", "tune") if is_search else ("run", "train")
        raise Refused(
            f"The {kind} {run.name} is not finished, so there is nothing to fetch yet: the same `tunefleet {command}` "
            f"goes on with it, and `tunefleet ps` says how far it is."
        )
    refuse_output(to, folder, overwrite, key="--to", permit="add --overwrite")
    if is_search:
        bring_search_home(run, to, plot=True)
    else:
        bring_home(folder, to, plot=True)
    return to
