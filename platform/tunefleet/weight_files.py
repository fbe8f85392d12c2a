"""The weights of a model on disk, read one parameter at a time, or a few rows of one.

A checkpoint's names are not always the model's: transformers renames some tensors while it loads, and makes one out of
several (the matrices of all experts of a layer). Its own rules are applied here, by its own functions. A tensor that is
only renamed is read row by row; one that is made of others is made whole each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from tunefleet.errors import Refused
from tunefleet.model_settings import ModelSettings


@dataclass
class _Recipe:
    """How a tensor of the model is made of tensors on disk."""

    first: str
    """The name that the converter goes by: its first result."""
    converter: WeightConverter | None
    pieces: list[tuple[str, str]] = field(default_factory=list)
    """Names on disk, each with the converter's pattern that it matched."""


class WeightFiles:
    """The safetensors files of a model, on this machine or fetched from the hub."""

    def __init__(self, settings: ModelSettings) -> None:
        """
        Raises:
            Refused: there are none.
        """
        self.name = settings.model_name_or_path
        self._paths: dict[str, Path] = {}
        for path in _files(self.name):
            with _opened(path) as file:
                self._paths |= dict.fromkeys(file.keys(), path)
        self._recipes: dict[str, _Recipe] = {}
        self._model: PreTrainedModel | None = None

    def dtype(self, named: torch.dtype | None) -> torch.dtype:
        """The number format that transformers would load in: what the configuration names, else the first weight's."""
        if named is not None:
            return named
        for key in sorted(self._paths):
            dtype = self._slice(key, 0, 0).dtype
            if dtype.is_floating_point:
                return dtype
        return torch.float32

    def fit(self, model: PreTrainedModel) -> None:
        """Find out where each tensor of a bare model comes from.

        Raises:
            Refused: some of them are in no file.
        """
        self._model = model
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        names = model.state_dict()
        for key in sorted(self._paths, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
            if name not in names and key in names:  # renamed in vain: perhaps only the prefix is another
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, names)
            converter = None if pattern is None else by_pattern[pattern]
            recipe = _Recipe(name, converter)
            for target in _targets(name, converter):
                if target in names:
                    recipe = self._recipes.setdefault(target, recipe)
            recipe.pieces.append((key, key if pattern is None else pattern))
        self._share_tied(model)
        self._refuse_gaps(model)

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows `start` to `stop` of a tensor of the model, in the number format that they are stored in.

        Raises:
            Refused: they cannot be read, or have another shape.
        """
        recipe = self._recipes[name]
        if recipe.converter is not None:
            return self._made(name, recipe)[start:stop]
        (key, _), *_ = recipe.pieces
        return self._slice(key, start, stop)

    def get(self, name: str) -> Tensor | None:
        """A whole tensor of the model; None if the files have none of that name.

        Raises:
            Refused: as `rows`.
        """
        return self.rows(name, 0, None) if name in self._recipes else None

    def _made(self, name: str, recipe: _Recipe) -> Tensor:
        assert recipe.converter is not None
        assert self._model is not None
        converter = deepcopy(recipe.converter)
        for key, pattern in recipe.pieces:
            read: Any = partial(self._slice, key, 0, None)  # transformers takes what it may call for a future as well
            converter.add_tensor(recipe.first, key, pattern, read)
        made = converter.convert(recipe.first, model=self._model, config=self._model.config)
        value = made[name]
        tensor = value[0] if isinstance(value, list) else value
        assert isinstance(tensor, Tensor)
        return tensor

    def _slice(self, key: str, start: int, stop: int | None) -> Tensor:
        with _opened(self._paths[key]) as file:
            stored = file.get_slice(key)
            rows: Tensor = stored[start:stop] if stored.get_shape() else file.get_tensor(key)
            return rows

    def _share_tied(self, model: PreTrainedModel) -> None:
        """Give every name of a tied parameter what one of them has in the files."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for alike in names.values():
            stored = [self._recipes[name] for name in alike if name in self._recipes]
            if stored:
                self._recipes |= {name: stored[0] for name in alike if name not in self._recipes}

    def _refuse_gaps(self, model: PreTrainedModel) -> None:
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        missing = [name for name in wanted if name not in self._recipes]
        if missing:
            raise Refused(
                f"The weights of {self.name} lack {len(missing)} tensors of the model, {missing[0]} first, and only a "
                "model that is loaded whole can make them up: write sharding: none."
            )
        for name, shape in wanted.items():
            recipe = self._recipes[name]
            if recipe.converter is None:
                with _opened(self._paths[recipe.pieces[0][0]]) as file:
                    stored = tuple(file.get_slice(recipe.pieces[0][0]).get_shape())
                if stored != shape:
                    raise Refused(
                        f"{name} of {self.name} has shape {list(stored)} on disk and {list(shape)} in the model: name "
                        "a folder whose config.json belongs to its weights."
                    )


def _targets(name: str, converter: WeightConverter | None) -> Iterable[str]:
    """Everything that comes out of the rule whose first result is `name`."""
    if converter is None:
        return (name,)
    first, *_ = converter.target_patterns
    return [name.replace(first, target) for target in converter.target_patterns]


def _files(name: str) -> list[Path]:
    local = Path(name).expanduser()
    place = str(local) if local.is_dir() else name
    quiet: Mapping[str, bool] = {"_raise_exceptions_for_missing_entries": False}
    try:
        single = cached_file(place, SAFE_WEIGHTS_NAME, **quiet)
        if single is not None:
            return [Path(single)]
        index = cached_file(place, SAFE_WEIGHTS_INDEX_NAME, **quiet)
        if index is not None:
            return [Path(file) for file in get_checkpoint_shard_files(place, index)[0]]
    except OSError as error:
        raise Refused(
            f"The weights of {name} cannot be read ({str(error).strip().splitlines()[0][:200]}): correct "
            "model_name_or_path, or make the model available here."
        ) from error
    raise Refused(
        f"{name} has no weights in safetensors files, which alone can be read in parts: save it with transformers' "
        "save_pretrained, or write sharding: none."
    )


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Opened anew for each tensor: what a file that stays open has shown counts as this process's memory."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise Refused(f"The weights in {path} are damaged ({error}): copy or download them again.") from error
