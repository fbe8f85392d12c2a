"""What a name in `dataset:` means: an entry of dataset_info.json, else an existing path, else a hub data set."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from tunefleet.data.formats import Columns, Formatting, Layout, Tags, default_columns, default_tags
from tunefleet.data.settings import DEFAULT_FOLDER
from tunefleet.errors import Refused

INFO_FILE = "dataset_info.json"
FILE_TYPES = ("json", "jsonl", "csv", "parquet", "arrow", "txt")

# What lies beside the data in a repository or in a folder written by `datasets.save_to_disk`.
_BESIDE = {"readme.md", "readme", "readme.txt", "license", "license.txt", "state.json", INFO_FILE}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ENTRY_KEYS = {"file_name", "hf_hub_url", "formatting", "columns", "tags", "subset", "split", "folder", "num_samples"}
_REFUSED_KEYS = {
    "script_url": "loading scripts are not run; convert the data to Parquet or JSON and set `file_name`",
    "cloud_file_name": "copy the file beside dataset_info.json and set `file_name`",
    "ms_hub_url": "set `hf_hub_url` or `file_name`",
    "om_hub_url": "set `hf_hub_url` or `file_name`",
}
_REFUSED_COLUMNS = {
    **dict.fromkeys(("images", "videos", "audios"), "only text is trained here; leave the column out"),
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), "preference data is not for stage sft or pt; name a `response`"),
}


@dataclass(frozen=True)
class HubName:
    """What `datasets.load_dataset` is called with."""

    path: str
    subset: str | None = None
    folder: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Source:
    """One data set: local `files` of one type, or a `hub` name; `layout` None means: look at the first records."""

    name: str
    files: tuple[Path, ...] = ()
    hub: HubName | None = None
    layout: Layout | None = None
    num_samples: int | None = None


def resolve(name: str, dataset_dir: str) -> Source:
    """Find the data set that `name` means. Raises `Refused` if it is nowhere, or its entry cannot be used."""
    if dataset_dir == "ONLINE":
        return Source(name, hub=HubName(name))
    if dataset_dir.startswith("REMOTE:"):
        raise Refused(f"`dataset_dir: {dataset_dir}` is not read here: download {INFO_FILE} and name its folder.")
    folder = Path(dataset_dir).expanduser()
    entries = _read_info(folder)
    if name in entries:
        return _from_entry(name, entries[name], folder)
    path = Path(name).expanduser()
    if path.exists():
        return Source(name, files=_files(path, f"`{name}`"))
    return _from_hub(name, entries, folder)


def suggestion(word: str, known: Iterable[str]) -> str:
    """' Did you mean `x`?' or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def _from_hub(name: str, entries: Mapping[str, Any], folder: Path) -> Source:
    close = suggestion(name, entries)
    looks_local = HUB_NAME.fullmatch(name) is None or Path(name).suffix[1:] in FILE_TYPES or name.startswith(".")
    if looks_local or (close and "/" not in name):
        raise Refused(
            f"The data set `{name}` is neither an entry of {folder / INFO_FILE} nor an existing path: "
            f"correct `dataset` or `dataset_dir`.{close}"
        )
    if folder != Path(DEFAULT_FOLDER) and not folder.is_dir():
        raise Refused(
            f"The data set `{name}` is no existing path, and `dataset_dir: {folder}` is no folder: correct one of them "
            "(dataset_dir: ONLINE looks on the hub only)."
        )
    return Source(name, hub=HubName(name))


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_FILE
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise Refused(f"{path} is not valid JSON ({problem}): correct it.") from None
    if not isinstance(entries, dict):
        raise Refused(f"{path} is not an object of named data sets: correct it.")
    return entries


def _from_entry(name: str, entry: object, folder: Path) -> Source:
    where = f"The entry `{name}` of {folder / INFO_FILE}"
    if not isinstance(entry, dict):
        raise Refused(f"{where} is not an object: give it at least `file_name` or `hf_hub_url`.")
    _check_keys(entry, where)
    layout = _layout(entry, where)
    num_samples = entry.get("num_samples")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        raise Refused(f"{where} has `num_samples: {num_samples}`: write a whole number above 0.")
    if "hf_hub_url" in entry:
        hub = HubName(entry["hf_hub_url"], entry.get("subset"), entry.get("folder"), entry.get("split") or "train")
        if hub.folder:
            _inside(folder, hub.folder, where, "folder")
        return Source(name, hub=hub, layout=layout, num_samples=num_samples)
    for key in ("subset", "folder", "split"):
        if entry.get(key) not in (None, "train"):
            raise Refused(f"{where} has `{key}` beside `file_name`: it applies to `hf_hub_url` only, leave it out.")
    path = _inside(folder, entry["file_name"], where, "file_name")
    if not path.exists():
        raise Refused(f"{where} names `{entry['file_name']}`, which is not in {folder}: put it there or correct it.")
    return Source(name, files=_files(path, where), layout=layout, num_samples=num_samples)


def _check_keys(entry: Mapping[str, Any], where: str) -> None:
    if entry.get("ranking"):
        raise Refused(f"{where} has `ranking: true`, of no use to stage sft and pt: name data with one answer each.")
    has_place = "hf_hub_url" in entry or "file_name" in entry
    for key in entry:
        # A mirror on another hub beside a place we can read is no choice that we would drop.
        if key in _ENTRY_KEYS or key == "ranking" or (key.endswith("_hub_url") and key in _REFUSED_KEYS and has_place):
            continue
        if key in _REFUSED_KEYS:
            raise Refused(f"{where} has `{key}`, which is not read here: {_REFUSED_KEYS[key]}.")
        raise Refused(f"{where} has the unknown key `{key}`: remove it.{suggestion(key, _ENTRY_KEYS)}")
    if not has_place:
        raise Refused(f"{where} names no data: set `file_name` or `hf_hub_url`.")


def _layout(entry: Mapping[str, Any], where: str) -> Layout | None:
    if not entry.keys() & {"formatting", "columns", "tags"}:
        return None
    formatting: Formatting = entry.get("formatting", "alpaca")
    if formatting not in get_args(Formatting):
        close = suggestion(str(formatting), get_args(Formatting))
        raise Refused(f"{where} has `formatting: {formatting}`: write alpaca, sharegpt or openai.{close}")
    columns, tags = default_columns(formatting), default_tags(formatting)
    if "columns" in entry:
        columns = Columns(**_named(entry["columns"], Columns, _REFUSED_COLUMNS, f"{where}, `columns`,"))
    if "tags" in entry:
        tags = Tags(**_named(entry["tags"], Tags, {}, f"{where}, `tags`,"))
        if formatting != "alpaca" and not (tags.role_tag and tags.content_tag):
            raise Refused(
                f"{where} has `tags` without `role_tag` and `content_tag`: add them, unlisted tags are unset."
            )
    return Layout(formatting, columns, tags)


def _named(value: object, kind: type[Columns] | type[Tags], refused: Mapping[str, str], where: str) -> dict[str, str]:
    known = [field.name for field in fields(kind)]
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise Refused(f"{where} is not an object of names: write {{{known[0]}: ...}}.")
    for key in value:
        if key in refused:
            raise Refused(f"{where} lists `{key}`: {refused[key]}.")
        if key not in known:
            raise Refused(f"{where} lists the unknown `{key}`: it may list {', '.join(known)}.{suggestion(key, known)}")
    return value


def _inside(folder: Path, relative: object, where: str, key: str) -> Path:
    if not isinstance(relative, str) or not relative:
        raise Refused(f"{where} has a `{key}` that is not a path: write a path inside {folder}.")
    root = folder.resolve()
    path = (root / relative).resolve()
    # A link that lies inside the folder may point out of it: whoever made the link meant it so.
    if Path(relative).is_absolute() or ".." in Path(relative).parts or not (root / relative).is_relative_to(root):
        raise Refused(f"{where} has `{key}: {relative}`, which leaves {folder}: name that path in `dataset` instead.")
    return path


def _files(path: Path, where: str) -> tuple[Path, ...]:
    """The data files of a path: itself, or the files of a folder, which must be of one type."""
    if path.is_file():
        files = [path]
    else:
        files = sorted(file for file in path.iterdir() if file.name[0] != "." and file.name.lower() not in _BESIDE)
    for file in files:
        if file.is_dir():
            raise Refused(f"{where}: {path} holds the folder `{file.name}`: name that folder itself.")
        if file.suffix[1:] not in FILE_TYPES:
            raise Refused(f"{where}: `{file.name}` is no data file: data files end in .{', .'.join(FILE_TYPES)}.")
    types = sorted({file.suffix[1:] for file in files})
    if not types:
        raise Refused(f"{where}: {path} holds no data file: data files end in .{', .'.join(FILE_TYPES)}.")
    if len(types) > 1:
        raise Refused(f"{where}: {path} mixes {' and '.join(types)} files: keep one type in a folder.")
    return tuple(files)
