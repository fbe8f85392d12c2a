"""What a search has found, as it lies in its storage: a folder `result`, and the runs of its trials."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tunefleet.artifacts.folder import RunFolder
from tunefleet.launch.home import bring_home, mark
from tunefleet.search.book import RUNS
from tunefleet.storage import Place

RESULT_FOLDER = "result"
_WINNERS = "winners.json"


def keep_result(search: Place, files: Path, winners: Sequence[str]) -> None:
    """Put tables, plots and recipes into the storage of their search.

    Args:
        files: a folder that holds them and nothing else.
        winners: the runs of the best trial, or of the front.
    """
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as name:
        folder = Path(name)
        shutil.copytree(files, folder, dirs_exist_ok=True)
        (folder / _WINNERS).write_text(json.dumps(list(winners)))
        search.child(RESULT_FOLDER).upload(folder)


def bring_search_home(search: Place, output_dir: Path, *, plot: bool) -> None:
    """Copy what a search has found to this machine, with model and record of the best trial if there is one best."""
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as name:
        folder = Path(name)
        search.child(RESULT_FOLDER).download(folder)
        winners: list[str] = json.loads((folder / _WINNERS).read_text())
        if len(winners) == 1:
            bring_home(RunFolder(search.child(RUNS, winners[0])), output_dir, plot)
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, output_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_WINNERS))
    mark(output_dir, search.uri)
