"""Reads the records of a `Source`, and hashes what it holds."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tunefleet.data.entries import HubName, Source
from tunefleet.data.formats import Record
from tunefleet.errors import Refused

if TYPE_CHECKING:
    from datasets import Dataset


def read(source: Source, *, max_samples: int | None, seed: int) -> list[Record]:
    """All records of `source`: first its `num_samples` drawn with `seed`, then the first `max_samples` of these."""
    records = _records(source)
    if source.num_samples is None:
        return list(itertools.islice(records, max_samples))
    everything = list(records)
    return [everything[index] for index in _drawn(len(everything), source.num_samples, seed)[:max_samples]]


def content_hash(source: Source) -> str:
    """sha256 of what the source holds (its bytes or Arrow batches, and how it is to be read), not of where it lies."""
    digest = hashlib.sha256()
    digest.update(json.dumps([asdict(source.layout) if source.layout else None, source.num_samples]).encode())
    if source.hub is not None:
        for batch in _load_hub(source.hub).with_format("arrow").iter(batch_size=10_000):
            for part in batch.combine_chunks().to_batches():
                digest.update(part.serialize())
        return digest.hexdigest()
    for path in source.files:
        digest.update(f"\0{path.suffix}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _drawn(count: int, wanted: int, seed: int) -> list[int]:
    """A random subset without repetition; what is wanted beyond the whole set is drawn with repetition."""
    random = np.random.Generator(np.random.PCG64(seed))
    drawn = random.permutation(count)[:wanted]
    if wanted > count > 0:
        drawn = np.concatenate([drawn, random.integers(0, count, wanted - count)])
    return [int(index) for index in drawn]


def _records(source: Source) -> Iterator[Record]:
    if source.hub is not None:
        yield from _load_hub(source.hub)
    for path in source.files:
        yield from _file_records(path)


def _file_records(path: Path) -> Iterator[Record]:
    kind = path.suffix[1:]
    try:
        if kind == "json":
            yield from _json_records(path)
        elif kind == "jsonl":
            yield from _json_lines(path)
        elif kind == "csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file)
        elif kind == "txt":
            with path.open(encoding="utf-8") as file:
                # A line is a document, as `datasets` reads text files; lines without text separate nothing.
                yield from ({"text": line.rstrip("\r\n")} for line in file if line.strip())
        elif kind == "parquet":
            yield from _parquet_records(path)
        else:
            yield from _arrow_records(path)
    except (UnicodeDecodeError, pa.ArrowException, csv.Error) as problem:
        raise Refused(f"{path} cannot be read as {kind} ({problem}): correct or replace the file.") from problem


def _json_records(path: Path) -> Iterator[Record]:
    """A list of objects, one object, or, as many tools write it, an object on each line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError as problem:
        if not text.lstrip().startswith("{"):
            raise Refused(f"{path} is not valid JSON ({problem}): correct the file.") from None
        yield from _json_lines(path)
        return
    for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _object(record, path, f"element {number}")


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as problem:
                raise Refused(f"{path}, line {number}, is not valid JSON ({problem}): correct the line.") from None
            yield _object(record, path, f"line {number}")


def _object(record: object, path: Path, where: str) -> Record:
    if not isinstance(record, dict):
        raise Refused(f"{path}, {where}, is {type(record).__name__}, not an object with named fields: correct it.")
    return record


def _parquet_records(path: Path) -> Iterator[Record]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=2048):
            yield from batch.to_pylist()


def _arrow_records(path: Path) -> Iterator[Record]:
    """Arrow IPC, in its file or its stream form; the first bytes tell which."""
    with pa.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            for number in range(reader.num_record_batches):
                yield from reader.get_batch(number).to_pylist()
            return
        mapped.seek(0)
        for batch in pa.ipc.open_stream(mapped):
            yield from batch.to_pylist()


def _load_hub(hub: HubName) -> Dataset:
    # Importing `datasets` takes about a second: only data sets from the hub pay for it.
    import datasets

    try:
        found = datasets.load_dataset(hub.path, name=hub.subset, data_dir=hub.folder, split=hub.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise Refused(
            f"The data set `{hub.path}` is no entry of dataset_info.json and no existing path, and the hub did not "
            f"give it ({first}): correct `dataset`, or download it and name its path."
        ) from problem
    if not isinstance(found, datasets.Dataset):
        raise Refused(f"The split `{hub.split}` of `{hub.path}` is no single table: name one split.")
    return found
