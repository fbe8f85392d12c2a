"""What travels with a submitted job: the recipe, and the local files that it names by relative paths.

A relative path means a file of this machine, which is sent along and lies at the same place in the job's working
folder. An absolute path, a URI or a hub name means what it means on the cluster, and is left as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunefleet.data.entries import INFO_FILE, resolve
from tunefleet.errors import Refused
from tunefleet.launch.off_this_machine import RECIPE_FILE, refuse_users_in_urls
from tunefleet.recipe.sections import Recipe
from tunefleet.stores import refuse_unknown_scheme
from tunefleet.training.deepspeed_config import NAMED

MOST_BYTES = 64 * 2**20
"""Ray's job server takes 100 MiB in one request, and the code is in it as well."""


@dataclass(frozen=True)
class Parcel:
    """Files of this machine, by their place in the job's working folder."""

    files: tuple[tuple[Path, Path], ...]
    """Where each lies, and where it goes."""
    size_bytes: int

    def pack(self, recipe: Path, folder: Path) -> None:
        """Copy everything into an empty folder, the recipe's file as `recipe.yaml`."""
        for source, target in self.files:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / target)
        shutil.copyfile(recipe, folder / RECIPE_FILE)


def refuse_outside(recipe: Path, root: Path) -> None:
    """See that a recipe lies where the command is given, since that is where its relative paths start.

    Raises:
        Refused: it lies elsewhere.
    """
    if not recipe.exists() or recipe.resolve().is_relative_to(root.resolve()):
        return
    raise Refused(
        f"{recipe} lies outside of {root}, where its relative paths would start and whose files travel with the job: "
        f"give the command in the recipe's folder or one above it."
    )


def parcel(recipe: Recipe, root: Path) -> Parcel:
    """Find out what a recipe needs of this machine.

    Args:
        root: the folder that relative paths start from.

    Raises:
        Refused: a path leads out of `root`, too much would travel, what the run leaves would go with the job, the
            recipe names a cluster, or a URL in it carries a user.
    """
    if recipe.ray.ray_address is not None:
        raise Refused(
            f"ray_address: {recipe.ray.ray_address} names a cluster, and the job runs on that of --address: remove it, "
            f"or write ray_address=null behind the recipe."
        )
    _refuse_passing_storage(recipe)
    refuse_users_in_urls(recipe.flat(), "--secret NAME")
    found: dict[Path, Path] = {}
    for key, path in _named(recipe, root):
        for file in _files_of(root / path):
            found[file] = _inside(key, file.relative_to(root) if file.is_relative_to(root) else path, root)
    size = sum(file.stat().st_size for file in found)
    if size > MOST_BYTES:
        largest = max(found, key=lambda file: file.stat().st_size)
        raise Refused(
            f"{size / 2**20:.0f} MiB of local files would travel with the job, the largest {found[largest]}, and "
            f"{MOST_BYTES // 2**20} MiB is the most: put them on storage that every node reaches, and name them by "
            f"an absolute path or as a data set or model of the hub."
        )
    return Parcel(tuple(sorted(found.items())), size)


def _refuse_passing_storage(recipe: Recipe) -> None:
    """What lies below the job's own folder is deleted with it."""
    checkpoint = recipe.run.resume_from_checkpoint
    named = (
        ("ray_storage_path", recipe.ray.ray_storage_path),
        ("resume_from_checkpoint", checkpoint if isinstance(checkpoint, str) else None),
        ("tokenized_path", recipe.data.tokenized_path),
    )
    for key, value in named:
        if value is not None and "://" in value:
            refuse_unknown_scheme(value)  # here, and not on the cluster
        if value is not None and _is_relative(value):
            raise Refused(
                f"{key}: {value} is relative, and would lie in the job's own folder, which goes with the job: write an "
                f"absolute path on storage that every node reaches, or a URI such as s3://bucket/runs."
            )


def _named(recipe: Recipe, root: Path) -> Iterator[tuple[str, Path]]:
    """The relative paths that a recipe names and that are there, with the key of each."""
    settings, adapters = recipe.data, recipe.flat().get("adapter_name_or_path")
    models = [("model_name_or_path", recipe.model.model_name_or_path)]
    models += [("adapter_name_or_path", str(name)) for name in adapters] if isinstance(adapters, list) else []
    for key, name in models:
        if _is_relative(name) and (root / name).exists():
            yield key, Path(name)
    deepspeed = recipe.training.deepspeed
    if isinstance(deepspeed, str) and deepspeed not in NAMED and _is_relative(deepspeed):
        yield "deepspeed", Path(deepspeed)
    info = Path(settings.dataset_dir) / INFO_FILE
    if _is_relative(settings.dataset_dir) and (root / info).is_file():
        yield "dataset_dir", info
    for key, names in (("dataset", settings.dataset), ("eval_dataset", settings.eval_dataset)):
        for file in _files_of_data(names, settings.dataset_dir, root):
            yield key, file


def _files_of_data(names: Sequence[str], dataset_dir: str, root: Path) -> Iterator[Path]:
    """The files of data sets that are named relatively, by path or as an entry of a relative `dataset_dir`."""
    for name in names:
        for file in resolve(name, dataset_dir).files:
            if not file.is_absolute():
                yield file
            elif _is_relative(name) and _is_relative(dataset_dir):  # an entry, whose path has been resolved
                yield Path(os.path.relpath(file, root.resolve()))


def _is_relative(text: str) -> bool:
    return "://" not in text and not text.startswith(("/", "~"))


def _inside(key: str, path: Path, root: Path) -> Path:
    """A path from `root`, with links in it followed: what is sent is below the folder that the command was given in.

    Raises:
        Refused: it leads out of the folder.
    """
    if ".." in path.parts or not (root / path).resolve().is_relative_to(root.resolve()):
        raise Refused(
            f"{key}: {path} leads out of {root}, whose files travel with the job: give the command in a folder above "
            f"it, or write an absolute path that is valid on the cluster."
        )
    return path


def _files_of(path: Path) -> list[Path]:
    """A file, or every file below a folder."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
