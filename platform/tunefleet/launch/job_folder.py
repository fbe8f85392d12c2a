"""What the relative paths of a recipe mean in a job whose working folder Ray has brought to the cluster.

That folder is a copy of what git does not ignore, and Ray throws it away some time after the job. So what a run leaves
is kept elsewhere, and what did not travel is looked for there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefleet.recipe.problems import Problem, RecipeError
from tunefleet.recipe.yaml_text import read_mapping, read_overrides, read_text
from tunefleet.settings import DEFAULT_STORAGE

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells a submitted job's script its own runtime environment."""
QUICKSTART = ".quickstart"
_STORAGE = "ray_storage_path"
_READ = ("model_name_or_path", "dataset_dir", "resume_from_checkpoint")
"""Keys that name what must be there before a run."""
_PREPARE = "python jobs/prepare_quickstart.py"


@dataclass(frozen=True)
class Settled:
    """What is laid over a recipe, and what is said of it."""

    words: tuple[str, ...] = ()
    """`key=value`"""
    notices: tuple[str, ...] = ()


def job_environment() -> Mapping[str, Any]:
    """The runtime environment of the submitted job that this process belongs to; empty where it is none."""
    job: dict[str, Any] = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    environment: dict[str, Any] = job.get("runtime_env") or {}
    return environment


def is_shipped() -> bool:
    """Whether this process is a job's whose working folder Ray has brought; one in the cluster's image stays."""
    folder = job_environment().get("working_dir")
    return isinstance(folder, str) and "://" in folder and not folder.startswith("local://")


def kept_folder(storage: object = None) -> Path:
    """Where a job that was shipped finds and keeps what is to stay: below its storage if that is a folder.

    Args:
        storage: `ray_storage_path` as written.
    """
    is_folder = isinstance(storage, str) and storage.startswith(("/", "~"))
    return Path(str(storage) if is_folder else DEFAULT_STORAGE).expanduser()


def goes_with_the_job(folder: Path) -> bool:
    """Whether a folder lies in the copy that Ray throws away, and shares out among jobs that brought the same files.

    Nothing is left there: nobody would find it, and another job's run may leave its own under the same name.
    """
    return is_shipped() and folder.is_relative_to(Path.cwd())


def lasting(folder: Path, kept: str) -> str:
    """Where somebody finds a result: in the folder that the recipe names, unless it goes with the job's.

    Args:
        folder: `output_dir`, absolute.
        kept: what storage has of it.
    """
    return kept if goes_with_the_job(folder) else str(folder)


def refuse_left_at_home(path: Path) -> None:
    """See that a recipe has travelled with the job that runs it.

    Raises:
        RecipeError: it has not.
    """
    if not is_shipped() or path.exists():
        return
    what = "is not in the job's folder, which is a copy of --working-dir without what git ignores"
    raise RecipeError([Problem(str(path), what, "keep the recipe there, and name it from there")])


def settled(path: Path, overrides: Sequence[str], root: Path) -> Settled:
    """What the relative paths of a recipe mean here.

    Args:
        path: of the recipe, which has been read without a problem.
        root: the folder that relative paths start from.

    Raises:
        RecipeError: what it needs of the quickstart is not there.
    """
    shipped = is_shipped()
    keys = read_mapping(read_text(path), str(path))[0] | read_overrides(overrides)[0]
    kept = kept_folder(keys.get(_STORAGE))
    named = {key: value for key in _READ if isinstance(value := keys.get(key), str) and _is_relative(value)}
    absent = {key: value for key, value in named.items() if not (root / value).exists()}
    found = {key: kept / value for key, value in absent.items() if shipped and (kept / value).exists()}
    missing = [key for key in absent if key not in found and Path(absent[key]).parts[0] == QUICKSTART]
    if missing:
        raise RecipeError([_unprepared(key, absent[key], kept if shipped else None) for key in missing])
    moved = [_moved(key, absent[key], place) for key, place in found.items()]
    storage = keys.get(_STORAGE)
    if shipped and isinstance(storage, str) and _is_relative(storage):
        found[_STORAGE] = kept / storage
        moved.append(f"{_STORAGE}: {storage} is relative, and this job's folder is a copy that goes: {kept / storage}.")
    return Settled(tuple(f"{key}={json.dumps(str(place))}" for key, place in found.items()), tuple(moved))


def _is_relative(text: str) -> bool:
    return bool(text) and "://" not in text and not text.startswith(("/", "~"))


def _moved(key: str, written: str, place: Path) -> str:
    return f"{key}: {written} did not travel with the job: {place}."


def _unprepared(key: str, written: str, kept: Path | None) -> Problem:
    """What is said where the quickstart's model or data are missing.

    Args:
        kept: where a job that was shipped looks; None on a machine of one's own.
    """
    if kept is None:
        return Problem(key, f"{written} is not there", f"make it with `make quickstart`, or `{_PREPARE} --base`")
    to = "" if kept == kept_folder() else f" --to {kept / QUICKSTART}"
    return Problem(
        key,
        f"{written} did not travel with the job (git ignores it) and is not in {kept}",
        f"make it there with `ray job submit --working-dir . -- {_PREPARE}{to}`",
    )
