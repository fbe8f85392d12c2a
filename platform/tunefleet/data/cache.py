"""A folder of token files that is either whole or not there: written beside its place, then renamed into it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from tunefleet.errors import Refused

MANIFEST = "manifest.json"


def load_or_build(
    folder: Path, build: Callable[[Path], Mapping[str, Any]], *, rebuild: bool
) -> tuple[dict[str, Any], bool]:
    """The manifest of `folder`, which is built first if it is missing or damaged, or if `rebuild`; True if it was.

    `build` writes files into the empty folder it is given and returns what the manifest should say besides their
    sizes and checksums. Two processes that ask at once build it once. Raises `Refused` if the place is not writable.
    """
    if not rebuild and (manifest := intact_manifest(folder)) is not None:
        return manifest, False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            # Someone else may have built it while we waited.
            if not rebuild and (manifest := intact_manifest(folder)) is not None:
                return manifest, False
            return _build(folder, build), True
    except OSError as problem:
        raise Refused(f"{folder} cannot be written ({problem}): set `cache_dir` or `tokenized_path`.") from problem


def intact_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder whose files are all as they were written, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, written in files.items():
            path = folder / name
            if path.stat().st_size != written["bytes"] or file_hash(path) != written["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(manifest)


def file_hash(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, build: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".new", dir=folder.parent))
    try:
        fresh.chmod(0o755)  # mkdtemp makes it private; the cache of a node may have several readers
        said = build(fresh)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in sorted(fresh.iterdir())
        }
        manifest = {**said, "files": files}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _swap_in(fresh, folder)
        return dict(json.loads(json.dumps(manifest)))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap_in(fresh: Path, folder: Path) -> None:
    """Move `fresh` to its place. What lay there is moved away first: readers that have mapped it keep their pages."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        folder.rename(old / "was")
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        fresh.rename(folder)
