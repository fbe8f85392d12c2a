"""From `DataSettings` to memory-mapped token rows: resolve, read, encode, split, pack, write; or find it all cached."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunefleet.data.cache import MANIFEST, intact_manifest, load_or_build
from tunefleet.data.encode import Encoder, Example, encode_all
from tunefleet.data.entries import Source, resolve
from tunefleet.data.formats import BadRecord, check_columns, conversation, detect, document
from tunefleet.data.masking import Masking, Sequence1D
from tunefleet.data.packing import best_fit
from tunefleet.data.settings import DataSettings
from tunefleet.data.sources import content_hash, read
from tunefleet.data.templates import Template, choose
from tunefleet.data.tokens import TokenSplit, open_split, write_split
from tunefleet.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of the key: raised whenever the same settings and rows would give other token rows than before.
_FORMAT = 2
_SHOWN_BAD_ROWS = 5
_LOOKED_AT = 100

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BadRow:
    """A row that is not used: `row` counts from 1 within its `source`."""

    source: str
    row: int
    reason: str


@dataclass(frozen=True)
class BadRows:
    """How many rows are not used, and the first few of them."""

    count: int
    first: tuple[BadRow, ...]


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Token rows, and what is worth knowing about how they came to be.

    `key` is the hash of rows, tokenizer and settings; `files` gives the sha256 of each token file. `template_jinja`
    is the chat template that a saved tokenizer should carry (empty for stage pt with a tokenizer that has none), and
    `stop_token_ids` are what `generate` should stop at. `built` is False if the cache had it all.
    """

    folder: Path
    key: str
    train: TokenSplit | None
    evaluation: TokenSplit | None
    bad_rows: BadRows
    template: str
    template_jinja: str
    stop_token_ids: tuple[int, ...]
    notices: tuple[str, ...]
    files: Mapping[str, str]
    built: bool


def prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    need_train: bool = True,
    need_eval: bool,
    progress: Progress | None = None,
) -> PreparedData:
    """Fill the token cache if these rows are not in it, and memory-map them.

    Raises `Refused` if data are missing or cannot be read, if no row is usable, or if `tokenized_path` holds rows
    that were made with other settings.
    """
    if settings.eval_dataset and settings.val_size:
        raise Refused("`eval_dataset` and `val_size` both name evaluation rows: leave one out.")
    if need_eval and not settings.has_evaluation:
        raise Refused("There are no rows to evaluate on: set `eval_dataset` or `val_size`.")
    template, notices = (None, ()) if settings.stage == "pt" else choose(settings.template, tokenizer)
    making = _Making(settings, tokenizer, template, seed, progress or _silent)
    arguments = _arguments(settings, tokenizer, template, seed)
    folder, manifest, built = _stored(making, arguments)
    has_train, has_eval = (f"{part}.arrow" in manifest["files"] for part in ("train", "evaluation"))
    return PreparedData(
        folder=folder,
        key=manifest["key"],
        train=open_split(folder / "train.arrow") if need_train and has_train else None,
        evaluation=open_split(folder / "evaluation.arrow") if need_eval and has_eval else None,
        bad_rows=BadRows(manifest["bad_rows"], tuple(BadRow(**row) for row in manifest["first_bad_rows"])),
        template=template.name if template else "",
        template_jinja=template.jinja if template else str(tokenizer.chat_template or ""),
        stop_token_ids=template.stop_token_ids if template else (int(tokenizer.eos_token_id or 0),),
        notices=(*notices, *manifest["notices"]),
        files={name: file["sha256"] for name, file in manifest["files"].items()},
        built=built,
    )


@dataclass(frozen=True)
class _Making:
    """What is needed to make token rows."""

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    seed: int
    progress: Progress

    def sources(self) -> tuple[list[Source], list[Source]]:
        """The data sets of training and of evaluation."""
        names, folder = self.settings, self.settings.dataset_dir
        return [resolve(name, folder) for name in names.dataset], [resolve(name, folder) for name in names.eval_dataset]

    def build(self, folder: Path, key: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Write the token files into `folder`; returns what their manifest says."""
        train_sources, eval_sources = self.sources()
        bad: list[BadRow] = []
        train = self._encoded(train_sources, bad, "training")
        held_out = self._encoded(eval_sources, bad, "evaluation") if eval_sources else []
        if self.settings.val_size:
            train, held_out = _split(train, self.settings.val_size, self.seed)
        notices = self._notices([*train, *held_out])
        self._write(folder / "train.arrow", train)
        if held_out:
            self._write(folder / "evaluation.arrow", held_out)
        return {
            "format": _FORMAT,
            "key": key,
            "arguments": dict(arguments),
            "bad_rows": len(bad),
            "first_bad_rows": [asdict(row) for row in bad[:_SHOWN_BAD_ROWS]],
            "notices": notices,
        }

    def _notices(self, conversations: Sequence[Sequence[Sequence1D]]) -> list[str]:
        """What a person should know of how the rows came to be."""
        notices: list[str] = []
        rows = sum(len(sequences) for sequences in conversations)
        if rows > len(conversations) and self.template is not None:
            notices.append(
                f"The chat template rewrites earlier turns: {len(conversations):,} conversations became {rows:,} rows, "
                "so that each answer follows the prompt it will meet."
            )
        cut = sum(one.cut for sequences in conversations for one in sequences)
        if cut:
            notices.append(
                f"{cut:,} of {rows:,} rows {'is' if cut == 1 else 'are'} longer than cutoff_len "
                f"{self.settings.cutoff_len:,} and cut."
            )
        return notices

    def _encoded(self, sources: Sequence[Source], bad: list[BadRow], what: str) -> list[list[Sequence1D]]:
        """The sequences of every good row of `sources`, in order; the others are appended to `bad`."""
        examples: list[Example] = []
        origins: list[tuple[str, int]] = []
        found_bad: list[BadRow] = []
        for number, source in enumerate(sources):
            self.progress(f"read {what}", number, len(sources))
            for row, example in enumerate(self._examples(source), start=1):
                if isinstance(example, BadRecord):
                    found_bad.append(BadRow(source.name, row, str(example)))
                else:
                    examples.append(example)
                    origins.append((source.name, row))
        self.progress(f"read {what}", len(sources), len(sources))
        masking = Masking(self.settings.cutoff_len, self.settings.train_on_prompt, self.settings.mask_history)
        encoder = Encoder(self.tokenizer, self.template, masking)
        processes = self.settings.preprocessing_num_workers
        good: list[list[Sequence1D]] = []
        stage = f"tokenise {what}"
        results = encode_all(examples, encoder, processes, lambda done, total: self.progress(stage, done, total))
        for (name, row), result in zip(origins, results, strict=True):
            if isinstance(result, str):
                found_bad.append(BadRow(name, row, result))
            else:
                good.append(result)
        names = [source.name for source in sources]
        found_bad.sort(key=lambda one: (names.index(one.source), one.row))
        if not good:
            raise Refused(_nothing_left(what, names, found_bad))
        bad += found_bad
        return good

    def _examples(self, source: Source) -> list[Example | BadRecord]:
        records = read(source, max_samples=self.settings.max_samples, seed=self.seed)
        if not records:
            return []
        stage, where = self.settings.stage, f"The data set `{source.name}`"
        layout = source.layout or detect(records[:_LOOKED_AT], stage, where)
        check_columns(records[:_LOOKED_AT], layout, stage, where)
        examples: list[Example | BadRecord] = []
        for record in records:
            try:
                examples.append(document(record, layout) if stage == "pt" else conversation(record, layout))
            except BadRecord as bad:
                examples.append(bad)
        return examples

    def _write(self, file: Path, examples: Sequence[Sequence[Sequence1D]]) -> None:
        segments = [segment for sequences in examples for segment in sequences]
        rows = [[segment] for segment in segments]
        if self.settings.packs:
            placed = best_fit([len(segment.ids) for segment in segments], self.settings.cutoff_len)
            rows = [[segments[index] for index in row] for row in placed]
        write_split(file, rows, lambda done, total: self.progress(f"write {file.stem}", done, total))


def _silent(stage: str, done: int, total: int) -> None:
    """No progress is wanted."""


def _nothing_left(what: str, names: Sequence[str], bad: Sequence[BadRow]) -> str:
    if not bad:
        return f"No {what} row is left: {', '.join(names)} is empty, name a data set with rows."
    shown = "; ".join(f"{row.source} row {row.row}: {row.reason}" for row in bad[:_SHOWN_BAD_ROWS])
    return f"No {what} row is left, all {len(bad)} are unusable ({shown}): correct the data or its entry's `columns`."


def _split(
    examples: list[list[Sequence1D]], val_size: float, seed: int
) -> tuple[list[list[Sequence1D]], list[list[Sequence1D]]]:
    """Hold out a fraction (below 1) or a count, drawn with `seed`. Both parts keep the order of the rows."""
    held = int(np.ceil(val_size * len(examples))) if val_size < 1 else int(val_size)
    if held >= len(examples):
        raise Refused(f"`val_size: {val_size:g}` leaves none of {len(examples)} rows to train on: set a smaller one.")
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, len(examples)])))
    chosen = set(random.permutation(len(examples))[:held].tolist())
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [examples[index] for index in sorted(chosen)]


def _arguments(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, template: Template | None, seed: int
) -> dict[str, Any]:
    """Every setting that the token rows depend on, besides the contents of the data sets."""
    return {
        "stage": settings.stage,
        "dataset": list(settings.dataset),
        "eval_dataset": list(settings.eval_dataset),
        "cutoff_len": settings.cutoff_len,
        "max_samples": settings.max_samples,
        "val_size": settings.val_size,
        "packing": settings.packs,
        "train_on_prompt": settings.train_on_prompt,
        "mask_history": settings.mask_history,
        "template": _hash(template.jinja) if template else None,
        "tokenizer": _tokenizer_hash(tokenizer),
        "seed": seed,
    }


def _stored(making: _Making, arguments: Mapping[str, Any]) -> tuple[Path, dict[str, Any], bool]:
    settings = making.settings
    if settings.tokenized_path is not None:
        return _tokenized(making, arguments, Path(settings.tokenized_path).expanduser())
    key = _key(making, arguments)
    folder = Path(settings.cache_dir or "~/.cache/tunefleet").expanduser() / key[:32]
    manifest, built = load_or_build(
        folder, lambda fresh: making.build(fresh, key, arguments), rebuild=settings.overwrite_cache
    )
    return folder, manifest, built


def _tokenized(making: _Making, arguments: Mapping[str, Any], folder: Path) -> tuple[Path, dict[str, Any], bool]:
    """Use the rows in `tokenized_path` if they were made with these arguments; make them if there are none."""
    rebuild = making.settings.overwrite_cache
    if folder.exists() and not folder.is_dir():
        raise Refused(f"`tokenized_path: {folder}` is a file: name a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MANIFEST).is_file():
            raise Refused(f"`tokenized_path: {folder}` holds other files than token rows: name an empty or new folder.")
        if not rebuild:
            _check_tokenized(folder, arguments)
    manifest, built = load_or_build(
        folder, lambda fresh: making.build(fresh, _key(making, arguments), arguments), rebuild=rebuild
    )
    return folder, manifest, built


def _check_tokenized(folder: Path, arguments: Mapping[str, Any]) -> None:
    manifest = intact_manifest(folder)
    if manifest is None or manifest.get("format") != _FORMAT:
        raise Refused(
            f"`tokenized_path: {folder}` is damaged or of another version: `overwrite_cache: true` makes it anew."
        )
    stored: dict[str, Any] = manifest["arguments"]
    differing = [name for name in arguments if arguments[name] != stored.get(name) and _matters(name, stored)]
    if differing:
        shown = ", ".join(_difference(name, stored, arguments) for name in differing)
        raise Refused(
            f"`tokenized_path: {folder}` was made with another {shown}: write what it was made with, or a new path."
        )


def _difference(name: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    # of these two the hash is compared, which tells a reader nothing
    return f"`{name}`" if name in ("template", "tokenizer") else f"`{name}` ({stored.get(name)}, now {wanted[name]})"


def _matters(name: str, stored: Mapping[str, Any]) -> bool:
    # The seed only draws the rows that are held out.
    return name != "seed" or stored["val_size"] > 0


def _key(making: _Making, arguments: Mapping[str, Any]) -> str:
    """sha256 of the rows' content, the tokenizer and the settings; names and places of files do not count."""
    train, evaluation = making.sources()
    drawn = bool(making.settings.val_size) or any(source.num_samples for source in (*train, *evaluation))
    known: dict[str, Any] = {
        **arguments,
        "format": _FORMAT,
        "dataset": [content_hash(source) for source in train],
        "eval_dataset": [content_hash(source) for source in evaluation],
        "seed": making.seed if drawn else None,
    }
    return _hash(json.dumps(known, sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the files that the tokenizer saves and of its special tokens; not of where it was loaded from."""
    digest = hashlib.sha256(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(tokenizer.save_pretrained(folder)):
            path = Path(name)
            if path.name in ("tokenizer_config.json", "chat_template.jinja") or not path.is_file():
                continue  # what matters of these is hashed by itself
            content = path.read_bytes()
            if path.name == "tokenizer.json":
                described = json.loads(content)
                # The state that the last call left behind, not a property of the tokenizer.
                described.pop("padding", None)
                described.pop("truncation", None)
                content = json.dumps(described, sort_keys=True).encode()
            digest.update(path.name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()
