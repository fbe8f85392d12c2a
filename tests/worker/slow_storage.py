"""A store that takes its time, or fails, on files of chosen checkpoints; and a run on it that a test can kill.

Run as a program: recipe (JSON), folder of the run, root, checkpoint that takes for ever.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystemHandler, LocalFileSystem, PyFileSystem
from tests.worker.alone import run_alone

from tunefleet.recipe.read import read_flat
from tunefleet.storage import Place


class Handler(FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """The local disk behind a file system that has no local paths; `before_writing` is told each path."""

    def __init__(self, before_writing: Callable[[str], None]) -> None:
        self._disk = LocalFileSystem()
        self._before_writing = before_writing

    def get_type_name(self) -> str:
        return "slow"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._disk.get_file_info(paths)

    def get_file_info_selector(self, selector: FileSelector) -> Any:
        return self._disk.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._disk.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._disk.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._disk.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._disk.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._disk.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._disk.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._disk.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return self._disk.open_input_file(path)

    def open_output_stream(self, path: str, metadata: object) -> Any:
        self._before_writing(path)
        return self._disk.open_output_stream(path)

    def open_append_stream(self, path: str, metadata: object) -> Any:
        return self._disk.open_append_stream(path)


def slow_place(folder: Path, before_writing: Callable[[str], None]) -> Place:
    """A folder of this disk behind a store that calls `before_writing` before it writes a file."""
    return Place(PyFileSystem(Handler(before_writing)), str(folder))


def main(recipe: Path, run: Path, root: Path, endless: str) -> None:
    def before_writing(path: str) -> None:
        if endless in path and path.endswith("optimizer.pt"):
            print("uploading", flush=True)
            time.sleep(600)

    run_alone(read_flat(json.loads(recipe.read_text())), root, storage=slow_place(run, before_writing))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
