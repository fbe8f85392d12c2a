"""Places: folders on any pyarrow file system, written atomically.

A folder that `Place.upload` wrote holds `complete.json`: every file with its size in bytes and its SHA-256. It is there
exactly when all the others are, so a folder without it is what a killed writer left.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.parse import quote

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from tunefleet.errors import Refused, RunFailed
from tunefleet.stores import OBJECT_STORES, PATIENCE_SECONDS, StoreFailed, open_uri, refuse_half_uri, with_patience

_T = TypeVar("_T")

COMPLETE = "complete.json"
CHUNK_BYTES = 8 * 2**20
STALE_NAME = re.compile(r"\..+\.tmp-[0-9a-f]{32}")

Files = dict[str, dict[str, int | str]]
"""The files of a folder, by name: `size` in bytes and `sha256`."""


class Damaged(RunFailed):
    """A stored folder is not what its writer left."""


@dataclass(frozen=True)
class Place:
    """A file or folder on a file system. `before` + path + `after` is the URI that opens it again.

    Whatever is done here is done again while the store is out of reach, for at most `patience_seconds`. Every method
    may raise StoreFailed: the store refused, or it stayed away for longer.
    """

    filesystem: FileSystem
    path: str
    before: str = ""
    after: str = ""
    patience_seconds: float = PATIENCE_SECONDS

    @property
    def name(self) -> str:
        return posixpath.basename(self.path.rstrip("/"))

    @property
    def uri(self) -> str:
        """What `place` turns into this place again, on any machine that sees the same store."""
        local = self.local_path
        return str(local) if local is not None else f"{self.before}{quote(self.path)}{self.after}"

    @property
    def local_path(self) -> Path | None:
        """The path on this machine; None where the file system is not the local one."""
        return Path(self.path) if isinstance(self.filesystem, LocalFileSystem) else None

    def child(self, *names: str) -> Place:
        """The place below this one."""
        return replace(self, path=posixpath.join(self.path, *names))

    def sibling(self, name: str) -> Place:
        """The place of that name in the same folder."""
        return replace(self, path=posixpath.join(posixpath.dirname(self.path), name))

    def exists(self) -> bool:
        """Whether a file or a folder is here."""
        return bool(self._info().type != FileType.NotFound)

    def changed(self) -> datetime | None:
        """When the file here was written last; None where there is none."""
        info = self._info()
        return info.mtime if info.type == FileType.File else None

    def children(self) -> list[Place]:
        """The files and folders right below, by name; none where there is no such folder."""
        selector = FileSelector(self.path, allow_not_found=True)
        found = self._patiently(lambda: self.filesystem.get_file_info(selector))
        return [self.child(name) for name in sorted(info.base_name for info in found)]

    def read_text(self) -> str:
        """The text of a file.

        Raises:
            FileNotFoundError: no file is here.
        """
        return self._patiently(self._content).decode("utf-8")

    def write_text(self, text: str) -> None:
        """Replace a file; whoever reads meanwhile sees the old text or the new one, never a piece."""
        self._replace(io.BytesIO(text.encode("utf-8")))

    def upload(self, folder: Path) -> None:
        """Copy a local folder here, in place of what was here, so that it is complete or not there at all.

        Raises:
            Refused: there is no such folder, or it holds a file of its own named complete.json.
        """
        self._names_to_copy(folder)
        staging = self.staging()
        try:
            self.seal(staging, [staging.fill(folder)])
        except BaseException:
            staging.discard()
            raise

    def staging(self) -> Place:
        """An empty place for the files of a folder that shall appear here: one for all of its writers."""
        if self._renames:
            return self._temporary()
        # The old seal goes first: from here until the new one is written this folder counts as incomplete.
        self.child(COMPLETE).delete()
        self.delete()
        return self

    def fill(self, folder: Path) -> Files:
        """Copy the files of a local folder into a staging place, where other writers may do the same.

        Raises:
            Refused: there is no such folder, or it holds a file of its own named complete.json.
        """
        written: Files = {}
        for name in self._names_to_copy(folder):
            with (folder / name).open("rb") as source:
                digest = self.child(name)._write(source)
                written[name] = {"size": source.tell(), "sha256": digest}
        return written

    def seal(self, staging: Place, parts: Sequence[Files]) -> None:
        """Let what the writers put into `staging` appear here, in place of what was here. The last step of a save.

        Args:
            parts: what each writer's `fill` returned.

        Raises:
            RunFailed: two writers wrote a file of the same name, or a file of one of them has not arrived.
        """
        files: Files = {}
        for number, part in enumerate(parts):
            for name in sorted(part.keys() & files.keys()):
                raise RunFailed(
                    f"Rank {number} and one before it both wrote {name} of {self.uri}: one of them is lost."
                )
            files |= part
        problem = staging._size_problem(files)
        if problem is not None:
            raise RunFailed(f"{self.uri} did not arrive whole ({problem}): does every node reach this very storage?")
        staging.child(COMPLETE)._write(io.BytesIO(json.dumps({"files": files}, indent=1).encode("utf-8")))
        if staging.path == self.path:
            return
        old = self._temporary()
        if self.exists():
            self._move(old)
        staging._move(self)
        old.delete()

    def discard(self) -> None:
        """Remove a staging place whose writers failed; what cannot be removed is unsealed and counts for nothing."""
        with suppress(OSError, StoreFailed):
            replace(self, patience_seconds=0.0).delete()

    def mirror(self, folder: Path) -> None:
        """Copy every file of a growing local folder here, each one atomically; nothing is removed, nothing sealed."""
        for name in _file_names(folder):
            with (folder / name).open("rb") as source:
                self.child(name)._replace(source)

    def download(self, to: Path) -> None:
        """Copy this folder to a local one. Sizes and hashes are checked where `complete.json` says them.

        Raises:
            Damaged: a file is missing, or its size or hash is another.
        """
        seal = self._seal()
        problem = self._size_problem(seal)
        if problem:
            raise Damaged(f"{self.uri} is damaged: {problem}; use an older checkpoint.")
        for name in seal if seal else self._sizes():
            target = to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = self.child(name)._read_to(target)
            if seal and digest != seal[name]["sha256"]:
                raise Damaged(f"{self.uri} is damaged: the content of {name} changed; use an older checkpoint.")

    def problem(self, *, hashes: bool = False) -> str | None:
        """What is wrong with a folder that `upload` wrote; None where it is whole. `hashes` reads every byte."""
        seal = self._seal()
        if seal is None:
            return f"{COMPLETE} is missing or unreadable (its writer was killed)"
        wrong = self._size_problem(seal)
        if wrong or not hashes:
            return wrong
        for name, expected in seal.items():
            if self.child(name)._read_to(None) != expected["sha256"]:
                return f"the content of {name} changed"
        return None

    def delete(self) -> None:
        """Remove what is here, if anything is. A reader never sees half a folder on file systems that can rename."""
        doomed = self
        if self._renames and not STALE_NAME.fullmatch(self.name) and self._info().type == FileType.Directory:
            doomed = self._temporary()
            self._move(doomed)
        doomed._patiently(doomed._remove)

    def try_out(self, patience_seconds: float | None = None) -> None:
        """Write a small file here and remove it, as a run will do.

        Args:
            patience_seconds: how long to go on trying; None = as long as ever.

        Raises:
            OSError, StoreFailed: that cannot be done.
        """
        trial = self.child(f".trial-{uuid.uuid4().hex}")
        content = io.BytesIO(b"tunefleet was here")

        def once() -> None:
            trial._write_once(content)
            self.filesystem.delete_file(trial.path)

        with_patience(once, self.uri, self.patience_seconds if patience_seconds is None else patience_seconds)

    @property
    def _renames(self) -> bool:
        return self.filesystem.type_name not in OBJECT_STORES

    def _patiently(self, work: Callable[[], _T]) -> _T:
        return with_patience(work, self.uri, self.patience_seconds)

    def _info(self) -> FileInfo:
        return self._patiently(lambda: self.filesystem.get_file_info([self.path])[0])

    def _remove(self) -> None:
        kind = self._info().type
        if kind == FileType.File:
            self.filesystem.delete_file(self.path)
        elif kind == FileType.Directory:
            self.filesystem.delete_dir(self.path)

    def _move(self, to: Place) -> None:
        self._patiently(lambda: self.filesystem.move(self.path, to.path))

    def _temporary(self) -> Place:
        return self.sibling(f".{self.name}.tmp-{uuid.uuid4().hex}")

    def _seal(self) -> Files | None:
        """Read `complete.json`: file name -> size and sha256. None where it is missing or torn."""
        try:
            files = json.loads(self.child(COMPLETE).read_text())["files"]
            return {str(name): {"size": int(one["size"]), "sha256": str(one["sha256"])} for name, one in files.items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _sizes(self) -> dict[str, int]:
        """Every file below, by its name from here, with its bytes."""
        selector = FileSelector(self.path, recursive=True)
        found = self._patiently(lambda: self.filesystem.get_file_info(selector))
        files = (info for info in found if info.type == FileType.File)
        return {posixpath.relpath(info.path, self.path): int(info.size) for info in files}

    def _size_problem(self, seal: Files | None) -> str | None:
        if seal is None:
            return None
        sizes = self._sizes()
        for name, expected in seal.items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != expected["size"]:
                return f"{name} has {sizes[name]} bytes instead of {expected['size']}"
        return None

    def _names_to_copy(self, folder: Path) -> list[str]:
        if not folder.is_dir():
            raise Refused(f"{folder} is no folder; nothing can be copied from it to {self.uri}.")
        names = _file_names(folder)
        if COMPLETE in names:
            raise Refused(f"{folder} holds a file named {COMPLETE}, the seal's own name; give that file another.")
        return names

    def _reader(self) -> BinaryIO:
        return cast(BinaryIO, self.filesystem.open_input_stream(self.path))

    def _replace(self, source: BinaryIO) -> None:
        """Write one file so that its old content stays until the new one is whole."""
        if not self._renames:  # an object appears when its stream is closed
            self._write(source)
            return
        target = self._temporary()
        try:
            target._write(source)
            target._move(self)
        except BaseException:
            target.discard()
            raise

    def _write(self, source: BinaryIO) -> str:
        """Write a file from the beginning of `source` straight to its name. Returns its SHA-256."""
        return self._patiently(lambda: self._write_once(source))

    def _write_once(self, source: BinaryIO) -> str:
        source.seek(0)
        with _writer(self) as stream:
            return _copy_hashed(source, stream)

    def _content(self) -> bytes:
        with self._reader() as stream:
            return bytes(stream.read())

    def _read_to(self, target: Path | None) -> str:
        """Copy a file to this machine, or only read it. Returns its SHA-256."""

        def once() -> str:
            with self._reader() as source:
                if target is None:
                    return _copy_hashed(source, None)
                with target.open("wb") as stream:
                    return _copy_hashed(source, stream)

        return self._patiently(once)


@contextmanager
def _writer(place: Place) -> Iterator[BinaryIO]:
    """A stream to a new file, its folder made first. On this machine's disks it is durable when the block ends."""
    local = place.local_path
    if local is not None:
        local.parent.mkdir(parents=True, exist_ok=True)
        with local.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        return
    if place._renames:
        place.filesystem.create_dir(posixpath.dirname(place.path), recursive=True)
    remote = place.filesystem.open_output_stream(place.path)
    try:
        yield cast(BinaryIO, remote)
    except BaseException:
        # There is no way to close a stream of pyarrow without making a file of what it was given so far.
        with suppress(OSError):
            remote.close()
            place.filesystem.delete_file(place.path)
        raise
    remote.close()


def _copy_hashed(source: BinaryIO, stream: BinaryIO | None) -> str:
    """Copy what is left of `source`, to nowhere if there is no stream, and return its SHA-256."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        if stream is not None:
            stream.write(chunk)
    return digest.hexdigest()


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def place(uri_or_path: str | Path, base: Path | None = None) -> Place:
    """Open a path (`~` too; a relative one is below `base`, or the current folder) or a URI as a place.

    Raises:
        Refused: the URI names no file system, carries credentials, or its store cannot be reached.
    """
    text = str(uri_or_path)
    if "://" not in text:
        refuse_half_uri(text)
        try:
            return Place(LocalFileSystem(), str(((base or Path.cwd()) / Path(text).expanduser()).resolve()))
        except RuntimeError as error:  # ~somebody
            raise Refused(
                f"{text} begins with a user that this machine does not have: write the whole path."
            ) from error
    opened = open_uri(text)
    return Place(opened.filesystem, opened.path, opened.before, opened.after)
