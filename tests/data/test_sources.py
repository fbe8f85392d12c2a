"""Every file type gives the same records, and a hash of what it holds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunefleet.data.entries import HubName, Source, resolve
from tunefleet.data.sources import content_hash, read
from tunefleet.errors import Refused

ROWS = [{"instruction": f"i{n}", "output": f"ö{n}"} for n in range(5)]


def write(path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "output"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "file.arrow", "stream.arrow"])
def test_every_type_gives_the_same_records(tmp_path: Path, name: str) -> None:
    source = resolve(str(write(tmp_path / name)), "nowhere")
    assert read(source, max_samples=None, seed=0) == ROWS
    assert read(source, max_samples=2, seed=0) == ROWS[:2]


def test_json_may_hold_a_record_on_each_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert read(resolve(str(tmp_path), "nowhere"), max_samples=None, seed=0) == ROWS


def test_a_line_of_plain_text_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo \n")
    assert read(resolve(str(tmp_path), "nowhere"), max_samples=None, seed=0) == [{"text": "one"}, {"text": "two "}]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b"[1, 2", "not valid JSON"),
        ("a.json", b"[1]", "element 1, is int"),
        ("a.jsonl", b'{"a": 1}\n{', "line 2, is not valid JSON"),
        ("a.jsonl", b"[]", "line 1, is list"),
        ("a.parquet", b"nonsense", "cannot be read as parquet"),
        ("a.arrow", b"nonsense", "cannot be read as arrow"),
        ("a.txt", b"\xff\xfe\xfd", "cannot be read as txt"),
        ("a.json", b"\xff", "cannot be read as json"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=sentence) as refusal:
        read(resolve(str(tmp_path), "nowhere"), max_samples=None, seed=0)
    assert name in str(refusal.value)


def test_num_samples_draws_with_the_seed_and_repeats_only_beyond_the_set(tmp_path: Path) -> None:
    files = (write(tmp_path / "a.json"),)
    three = read(Source("a", files, num_samples=3), max_samples=None, seed=1)
    assert three == read(Source("a", files, num_samples=3), max_samples=None, seed=1)
    assert len({row["instruction"] for row in three}) == 3
    eight = read(Source("a", files, num_samples=8), max_samples=None, seed=1)
    assert len(eight) == 8
    assert len({row["instruction"] for row in eight}) == 5


def test_the_hash_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    first = content_hash(Source("a", (write(tmp_path / "a.json"),)))
    assert content_hash(Source("b", ((tmp_path / "a.json").rename(tmp_path / "b.json"),))) == first
    (tmp_path / "b.json").write_text(json.dumps(ROWS).replace("i3", "j3"))
    assert content_hash(Source("b", (tmp_path / "b.json",))) != first


def test_hub_names_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "a.jsonl")
    source = Source("x", hub=HubName(str(tmp_path / "set")))
    assert read(source, max_samples=None, seed=0) == ROWS
    assert content_hash(source) == content_hash(source)
    with pytest.raises(Refused, match="the hub did not give it"):
        read(Source("x", hub=HubName(str(tmp_path / "none"))), max_samples=None, seed=0)
