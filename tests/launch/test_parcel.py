"""What travels with a job, and what is refused to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunefleet.errors import Refused
from tunefleet.launch import parcel as parcels
from tunefleet.launch.off_this_machine import RECIPE_FILE
from tunefleet.launch.parcel import parcel
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import Recipe


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folder: data with an index, of which one data set is not used, and a small model."""
    folder = tmp_path / "home"
    for name, text in {
        "data/rows.jsonl": '{"text": "a"}\n',
        "data/others.jsonl": '{"text": "b"}\n',
        "data/dataset_info.json": json.dumps({"rows": {"file_name": "rows.jsonl"}, "o": {"file_name": "others.jsonl"}}),
        "model/config.json": "{}",
        "model/tokenizer/x.json": "{}",
        "plain.jsonl": '{"text": "c"}\n',
        "ds.json": "{}",
        "one/adapter_config.json": "{}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "secret.jsonl").write_text('{"text": "d"}\n')
    monkeypatch.chdir(folder)
    return folder


def recipe(**keys: object) -> Recipe:
    base: dict[str, object] = {
        "model_name_or_path": "model",
        "dataset": "rows",
        "dataset_dir": "data",
        "finetuning_type": "full",
        "output_dir": "out",
        "ray_storage_path": "/mnt/runs",
    }
    return read_flat(base | keys)


def travels(root: Path, **keys: object) -> set[str]:
    return {str(target) for _, target in parcel(recipe(**keys), root).files}


def test_what_a_recipe_names_relatively_travels_and_nothing_else(root: Path) -> None:
    index = {"data/dataset_info.json", "data/rows.jsonl"}
    model = {"model/config.json", "model/tokenizer/x.json"}
    assert travels(root) == index | model
    assert travels(root, model_name_or_path="org/name") == index
    assert travels(root, model_name_or_path="org/name", dataset="plain.jsonl", dataset_dir="none") == {"plain.jsonl"}
    assert travels(root, model_name_or_path=str(root / "model")) == index
    assert travels(root, model_name_or_path="org/name", deepspeed="ds.json") == index | {"ds.json"}
    assert travels(root, model_name_or_path="org/name", deepspeed="zero2") == index
    assert "data/others.jsonl" in travels(root, eval_dataset="o")
    adapters = {"finetuning_type": "lora", "adapter_name_or_path": "one,two"}
    assert travels(root, model_name_or_path="org/name", **adapters) == index | {"one/adapter_config.json"}


def test_the_parcel_lies_as_it_lay(root: Path, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (root / "r.yaml").write_text("a: 1")
    parcel(recipe(), root).pack(root / "r.yaml", tmp_path / "to")
    assert (tmp_path / "to" / RECIPE_FILE).read_text() == "a: 1"
    assert (tmp_path / "to" / "data" / "rows.jsonl").read_text() == '{"text": "a"}\n'


@pytest.mark.parametrize("way", ["dots", "link"])
def test_a_path_that_leads_out_is_refused(root: Path, way: str) -> None:
    if way == "link":
        (root / "linked.jsonl").symlink_to(root.parent / "secret.jsonl")
    name = "../secret.jsonl" if way == "dots" else "linked.jsonl"
    with pytest.raises(Refused, match=r"dataset: .* leads out of"):
        parcel(recipe(dataset=name), root)


def test_a_link_inside_a_folder_that_leads_out_is_refused(root: Path) -> None:
    (root / "model" / "weights.bin").symlink_to(root.parent / "secret.jsonl")
    with pytest.raises(Refused, match=r"model_name_or_path: model/weights.bin leads out of"):
        parcel(recipe(), root)


def test_too_much_is_refused_by_the_largest_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (root / "data" / "rows.jsonl").open("wb") as file:
        file.truncate(2 * 2**30)  # a sparse file: no disk is filled
    with pytest.raises(Refused, match=r"2048 MiB .* the largest data/rows\.jsonl, and 64 MiB is the most"):
        parcel(recipe(), root)
    monkeypatch.setattr(parcels, "MOST_BYTES", 3 * 2**30)
    assert parcel(recipe(), root).size_bytes > 2 * 2**30


@pytest.mark.parametrize(
    ("key", "value"),
    [("ray_storage_path", "runs"), ("resume_from_checkpoint", "a/step_00000005"), ("tokenized_path", "t")],
)
def test_what_would_go_with_the_job_is_refused(root: Path, key: str, value: str) -> None:
    with pytest.raises(Refused, match=f"{key}: {value} is relative"):
        parcel(recipe(**{key: value}), root)


def test_a_store_of_no_known_kind_is_refused_here_and_not_on_the_cluster(root: Path) -> None:
    with pytest.raises(Refused, match=r"ftp://x/y cannot be opened: .* s3://, gs:// or hdfs://"):
        parcel(recipe(ray_storage_path="ftp://x/y"), root)
