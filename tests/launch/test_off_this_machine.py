"""What only this machine has is refused before anything is rendered, with the mend; a store's port is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunefleet.errors import Refused
from tunefleet.launch.off_this_machine import Storage, refuse_local, storage_of

CLAIM, STORE = Storage("/mnt/tunefleet/runs", "models"), Storage("s3://bucket/runs", None)
HUB = {"model_name_or_path": "org/model", "dataset": "org/rows,other", "output_dir": "outputs/a"}
MOUNTED = {
    "model_name_or_path": "/mnt/tunefleet/base",
    "dataset": "rows,/mnt/tunefleet/more.jsonl",
    "dataset_dir": "/mnt/tunefleet/data",
    "adapter_name_or_path": "/mnt/tunefleet/one,/mnt/tunefleet/two",
    "output_dir": "outputs/a",
    "tokenized_path": "/mnt/tunefleet/tokens",
    "resume_from_checkpoint": "/mnt/tunefleet/runs/a/checkpoints/step-10",
}


@pytest.mark.parametrize("keys", [HUB, {**HUB, "dataset_dir": "ONLINE"}, {**HUB, "resume_from_checkpoint": "s3://b/c"}])
def test_the_hub_is_reached_from_everywhere(keys: dict[str, Any]) -> None:
    refuse_local(keys, CLAIM)
    refuse_local(keys, STORE)


def test_the_claim_is_mounted_everywhere() -> None:
    refuse_local(MOUNTED, CLAIM)
    with pytest.raises(Refused) as refused:
        refuse_local(MOUNTED, STORE)
    said = str(refused.value)
    assert "model_name_or_path: '/mnt/tunefleet/base' is a path of this machine" in said
    assert "add --storage pvc://CLAIM" in said


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"model_name_or_path": ".quickstart/base"},
            "model_name_or_path: '.quickstart/base' is a path of this machine, which no pod can reach; put it on the "
            "claim models and write model_name_or_path: /mnt/tunefleet/base; or write the name of a model on the hub",
        ),
        ({"model_name_or_path": "~/base"}, "model_name_or_path"),
        ({"model_name_or_path": "/mnt/tunefleet/../home/base"}, "model_name_or_path"),
        ({"adapter_name_or_path": ["/home/me/adapter"]}, "adapter_name_or_path"),
        ({"dataset_dir": "/home/me/data"}, "dataset_dir: '/home/me/data' is a path of this machine"),
        ({"dataset": "rows.jsonl"}, "dataset: 'rows.jsonl' is a path of this machine"),
        ({"dataset": "org/rows, ./rows"}, "dataset: './rows' is a path of this machine"),
        ({"eval_dataset": "/home/me/rows.csv"}, "eval_dataset"),
        ({"tokenized_path": "tokens"}, "tokenized_path"),
        ({"resume_from_checkpoint": "runs/a"}, "resume_from_checkpoint"),
        ({"output_dir": "/home/me/out"}, "output_dir: '/home/me/out' is a folder of this machine"),
        ({"ray_address": "auto"}, "ray_address: names a cluster"),
    ],
)
def test_what_only_this_machine_has_is_refused(
    wrong: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused) as refused:
        refuse_local({**HUB, **wrong}, CLAIM)
    assert str(refused.value).startswith(sentence)


def test_what_lies_here_is_not_taken_for_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    with pytest.raises(Refused) as refused:
        refuse_local(HUB, CLAIM)
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == ["model_name_or_path", "dataset_dir"]


@pytest.mark.parametrize(
    ("option", "written", "storage"),
    [
        ("s3://b/r", ".quickstart/runs", Storage("s3://b/r", None)),
        (None, "gs://b/r", Storage("gs://b/r", None)),
        ("pvc://models", "s3://b/r", Storage("/mnt/tunefleet/runs", "models")),
        ("pvc://models/team/a", None, Storage("/mnt/tunefleet/team/a", "models")),
    ],
)
def test_the_option_wins(option: str | None, written: str | None, storage: Storage) -> None:
    assert storage_of(option, written) == storage


@pytest.mark.parametrize(
    ("option", "written", "sentence"),
    [
        (None, None, "ray_storage_path is not written, and its default is a folder of this machine"),
        (None, "~/runs", "ray_storage_path: ~/runs is a folder of this machine"),
        ("pvc://Not A Claim", None, "names no claim"),
        ("pvc://models/../etc", None, "names no claim"),
        ("s3://key:secret@bucket/runs", None, "credential|password|secret"),
        ("s3://", None, "s3:// names no bucket: write s3://BUCKET/FOLDER"),
        ("", "s3://b/r", "ray_storage_path is not written"),
        ("s3:///x", None, "s3:///x names no bucket"),
        ("s3://bu cket/r", None, "s3://bu cket/r names no bucket"),
        ("gs://Bucket/r", None, "gs://Bucket/r names no bucket"),
        ("s3://b/r?endpoint_override=minio:x", None, "write HOST:PORT with a port from 1 to 65535"),
        ("s3://b/r?endpoint_override=minio:70000&scheme=http", None, "write HOST:PORT with a port from 1 to 65535"),
        ("s3://b/r?endpoint_override=http://minio:0/", None, "write HOST:PORT with a port from 1 to 65535"),
        ("hdfs://names:x/r", None, "write HOST:PORT with a port from 1 to 65535"),
        ("ftp://b/r", None, "ftp://b/r begins with a scheme that is not taken: write one of s3://, gs://, hdfs://"),
        ("az://b/r", None, "az://b/r begins with a scheme that is not taken"),
        ("s3:b/r", None, "s3:b/r is half a URI"),
    ],
)
def test_storage_that_is_none_is_refused(option: str | None, written: str | None, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        storage_of(option, written)


def test_a_password_for_a_server_is_not_repeated() -> None:
    with pytest.raises(Refused) as refused:
        storage_of("s3://b/r?endpoint_override=u:hunter2@minio:9000", None)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("uri", ["s3://b/r", "gs://a_b/r", "gs://anonymous@b/r", "hdfs:///r", "hdfs://me@names:8020/r"])
def test_stores_are_taken_as_they_are_written(uri: str) -> None:
    assert storage_of(uri, None) == Storage(uri, None)


@pytest.mark.parametrize(
    ("uri", "ports"),
    [
        ("s3://b/r", []),
        ("s3://b/r?endpoint_override=minio:9000&scheme=http", [9000]),
        ("s3://b/r?endpoint_override=http://minio:9000/", [9000]),
        ("s3://b/r?endpoint_override=minio&scheme=http", [80]),
        ("hdfs://names:8020/r", [8020]),
        ("gs://b/r", [80, 988]),
    ],
)
def test_the_port_of_a_store_is_known(uri: str, ports: list[int]) -> None:
    assert Storage(uri, None).ports == ports
