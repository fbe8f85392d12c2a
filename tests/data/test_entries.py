"""What a name in `dataset:` means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunefleet.data.entries import HubName, resolve
from tunefleet.data.formats import OPENAI_TAGS, Columns, Tags
from tunefleet.errors import Refused


def info(folder: Path, **entries: Any) -> str:
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return str(folder)


def test_an_entry_comes_before_a_path_and_a_path_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    Path("both").mkdir()
    Path("both/other.json").write_text("[]")
    folder = info(tmp_path, both={"file_name": "rows.json"})
    assert resolve("both", folder).files == (tmp_path / "rows.json",)
    assert resolve("both", "nowhere").files == (Path("both/other.json"),)
    assert resolve("owner/name", folder).hub == HubName("owner/name")
    assert resolve("both", "ONLINE").hub == HubName("both")


def test_unlisted_columns_and_tags_are_unset(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "talk"}}
    entry["tags"] = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"}
    folder = info(tmp_path, some=entry, plain={"file_name": "rows.json"}, talk={"file_name": "rows.json"})
    layout = resolve("some", folder).layout
    assert layout is not None
    assert layout.columns == Columns(messages="talk")
    assert layout.tags == Tags("who", "what", "me", "it")
    assert resolve("plain", folder).layout is None


def test_openai_tags_need_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    layout = resolve("talk", info(tmp_path, talk={"file_name": "rows.json", "formatting": "openai"})).layout
    assert layout is not None
    assert layout.tags == OPENAI_TAGS
    assert layout.columns == Columns(messages="messages")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"file_name": "rows.json", "ranking": True}, "ranking"),
        ({"script_url": "x"}, "loading scripts are not run"),
        ({"cloud_file_name": "s3://x"}, "copy the file"),
        ({"ms_hub_url": "x"}, "set `hf_hub_url` or `file_name`"),
        ({"file_name": "rows.json", "fromatting": "alpaca"}, "Did you mean `formatting`"),
        ({"file_name": "rows.json", "formatting": "sharegtp"}, "Did you mean `sharegpt`"),
        ({"file_name": "rows.json", "columns": {"promt": "x"}}, "Did you mean `prompt`"),
        ({"file_name": "rows.json", "columns": {"images": "x"}}, "only text"),
        ({"file_name": "rows.json", "columns": {"chosen": "x"}}, "preference data"),
        ({"file_name": "rows.json", "formatting": "sharegpt", "tags": {"role_tag": "r"}}, "content_tag"),
        ({"file_name": "rows.json", "split": "test"}, "applies to `hf_hub_url` only"),
        ({"file_name": "../rows.json"}, "leaves"),
        ({"file_name": "/etc/passwd"}, "leaves"),
        ({"hf_hub_url": "a/b", "folder": "../x"}, "leaves"),
        ({"file_name": "missing.json"}, "is not in"),
        ({"formatting": "alpaca"}, "names no data"),
        ({"file_name": "rows.json", "num_samples": 0}, "above 0"),
        ("rows.json", "not an object"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path: Path, entry: object, sentence: str) -> None:
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(Refused, match=sentence):
        resolve("name", info(tmp_path, name=entry))


def test_a_mirror_beside_a_usable_place_is_no_obstacle(tmp_path: Path) -> None:
    folder = info(tmp_path, name={"hf_hub_url": "a/b", "ms_hub_url": "c/d", "subset": "en", "split": "test"})
    assert resolve("name", folder).hub == HubName("a/b", "en", None, "test")


def test_names_that_are_nowhere(tmp_path: Path) -> None:
    folder = info(tmp_path, alpaca_demo={"file_name": "rows.json"})
    for name in ("alpaca_dmo", "./rows.json", "sub/dir/rows", "rows.jsonl"):
        with pytest.raises(Refused, match="neither an entry"):
            resolve(name, folder)
    with pytest.raises(Refused, match="Did you mean `alpaca_demo`"):
        resolve("alpaca_dmo", folder)


def test_folders_hold_one_type(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "README.md", ".hidden"):
        (tmp_path / name).write_text("")
    assert [file.name for file in resolve(str(tmp_path), "nowhere").files] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(Refused, match="mixes csv and jsonl"):
        resolve(str(tmp_path), "nowhere")
    (tmp_path / "c.csv").rename(tmp_path / "c.bin")
    with pytest.raises(Refused, match=r"`c.bin` is no data file"):
        resolve(str(tmp_path), "nowhere")


def test_a_broken_info_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(Refused, match="not valid JSON"):
        resolve("x", str(tmp_path))
