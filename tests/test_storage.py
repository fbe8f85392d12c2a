"""Places, and checkpoints in them, on the local disk and on a file system that is reached through pyarrow alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from tunefleet.checkpoints import download_newest, forget_after, newest_complete, prune, step_name, step_of, to_delete
from tunefleet.errors import Refused
from tunefleet.storage import COMPLETE, Damaged, Place, place


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder as a local path, and behind a file system that has no local paths."""
    (tmp_path / "store").mkdir()
    if request.param == "local":
        return place(tmp_path / "store")
    return Place(SubTreeFileSystem(str(tmp_path / "store"), LocalFileSystem()), "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "rank").mkdir(parents=True)
    (source / "weights.bin").write_bytes(bytes(range(256)) * 50)
    (source / "rank" / "0.txt").write_text("zero", encoding="utf-8")
    return source


def disk(root: Place, tmp_path: Path) -> Path:
    return root.local_path or tmp_path / "store" / root.path


def save(root: Place, folder: Path, *steps: int) -> None:
    for step in steps:
        root.child(step_name(step)).upload(folder)


def test_upload_and_download_keep_every_byte(root: Place, folder: Path, tmp_path: Path) -> None:
    target = root.child("a", "b")
    target.upload(folder)
    target.download(tmp_path / "back")
    assert (tmp_path / "back" / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()
    assert (tmp_path / "back" / "rank" / "0.txt").read_text(encoding="utf-8") == "zero"
    assert not (tmp_path / "back" / COMPLETE).exists()
    assert target.problem(hashes=True) is None
    assert [one.name for one in root.child("a").children()] == ["b"]


def test_upload_replaces_the_whole_folder(root: Place, folder: Path) -> None:
    target = root.child("model")
    target.upload(folder)
    (folder / "weights.bin").unlink()
    target.upload(folder)
    assert [one.name for one in target.children()] == [COMPLETE, "rank"]
    assert [one.name for one in root.children()] == ["model"]


def test_what_cannot_be_uploaded_leaves_the_old_folder(root: Place, folder: Path, tmp_path: Path) -> None:
    target = root.child("model")
    target.upload(folder)
    (folder / COMPLETE).write_text("{}", encoding="utf-8")
    with pytest.raises(Refused, match=COMPLETE):
        target.upload(folder)
    with pytest.raises(Refused, match="no folder"):
        target.upload(tmp_path / "missing")
    assert target.problem(hashes=True) is None


def test_a_killed_writer_leaves_the_old_folder(folder: Path, tmp_path: Path) -> None:
    root = place(tmp_path / "store")
    save(root, folder, 5)
    os.truncate(folder / "weights.bin", 2**40)  # sparse: its reading takes longer than the test
    script = "import sys; from pathlib import Path; from tunefleet.storage import place; "
    script += "place(sys.argv[1]).upload(Path(sys.argv[2]))"
    writer = subprocess.Popen([sys.executable, "-c", script, root.child("step_00000005").path, folder])
    try:
        while len(root.children()) < 2:
            assert writer.poll() is None
            time.sleep(0.01)
    finally:
        writer.kill()
        writer.wait()
    assert root.child("step_00000005").problem(hashes=True) is None
    assert len(prune(root, None, None)) == 1
    assert [one.name for one in root.children()] == ["step_00000005"]


def test_text_is_replaced_and_missing_text_raises(root: Place) -> None:
    note = root.child("x", "note.json")
    with pytest.raises(FileNotFoundError):
        note.read_text()
    note.write_text("ä1")
    note.write_text("ä2")
    assert note.read_text() == "ä2"
    assert [one.name for one in root.child("x").children()] == ["note.json"]
    note.delete()
    note.delete()
    assert not note.exists()


def test_mirror_follows_a_growing_folder(root: Place, folder: Path) -> None:
    root.child("record").mirror(folder)
    (folder / "rank" / "0.txt").write_text("zero and one", encoding="utf-8")
    root.child("record").mirror(folder)
    assert root.child("record", "rank", "0.txt").read_text() == "zero and one"
    assert not root.child("record", COMPLETE).exists()


def test_download_without_a_seal_takes_everything(root: Place, folder: Path, tmp_path: Path) -> None:
    root.child("record").mirror(folder)
    root.child("record").download(tmp_path / "back")
    assert (tmp_path / "back" / "rank" / "0.txt").read_text(encoding="utf-8") == "zero"


@pytest.mark.parametrize("harm", ["gone", "short", "unsealed", "torn seal"])
def test_the_newest_whole_checkpoint_is_found(root: Place, folder: Path, tmp_path: Path, harm: str) -> None:
    save(root, folder, 5, 10, 20)
    newest = disk(root, tmp_path) / "step_00000020"
    if harm == "gone":
        (newest / "weights.bin").unlink()
    elif harm == "short":
        (newest / "weights.bin").write_bytes(b"short")
    elif harm == "unsealed":
        (newest / COMPLETE).unlink()
    else:
        (newest / COMPLETE).write_text('{"files": {"weig', encoding="utf-8")
    found, notices = newest_complete(root)
    assert found is not None
    assert step_of(found) == 10
    assert len(notices) == 1
    assert "step_00000020" in notices[0]


def test_changed_bytes_are_found_by_their_hash(root: Place, folder: Path, tmp_path: Path) -> None:
    save(root, folder, 5, 10)
    weights = disk(root, tmp_path) / "step_00000010" / "weights.bin"
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    by_size, _ = newest_complete(root)
    by_hash, notices = newest_complete(root, hashes=True)
    assert by_size is not None
    assert step_of(by_size) == 10
    assert by_hash is not None
    assert step_of(by_hash) == 5
    assert "weights.bin changed" in notices[0]
    with pytest.raises(Damaged, match=r"weights\.bin changed"):
        by_size.download(tmp_path / "bad")
    found, notices = download_newest(root, tmp_path / "good")
    assert found is not None
    assert step_of(found) == 5
    assert len(notices) == 1
    assert (tmp_path / "good" / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()


def test_no_checkpoint_is_no_error(root: Place) -> None:
    assert newest_complete(root.child("nothing")) == (None, [])
    assert root.child("nothing").children() == []


@pytest.mark.parametrize(
    ("keep", "best", "gone"),
    [
        (None, None, []),
        (9, None, []),
        (2, None, [5, 10]),
        (2, 20, [5, 10]),
        (2, 5, [10, 20]),
        (1, 10, [5, 20]),
        (1, 99, [5, 10, 20]),
        (3, 10, [5]),
    ],
)
def test_retention(keep: int | None, best: int | None, gone: list[int]) -> None:
    names = [step_name(step) for step in (10, 30, 5, 20)]
    chosen = None if best is None else step_name(best)
    assert to_delete(names, keep, chosen) == [step_name(step) for step in gone]


def test_long_step_numbers_sort_as_numbers() -> None:
    assert to_delete([step_name(123456789), step_name(99999999)], 1, None) == ["step_99999999"]


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(Refused, match="save_total_limit"):
        to_delete(["step_00000001"], 0, None)


def test_prune_takes_old_stale_and_damaged(root: Place, folder: Path, tmp_path: Path) -> None:
    save(root, folder, 5, 10, 15, 20, 25)
    (disk(root, tmp_path) / "step_00000015" / COMPLETE).unlink()
    (disk(root, tmp_path) / "step_00000025" / COMPLETE).unlink()
    stale = disk(root, tmp_path) / f".step_00000030.tmp-{'0' * 32}"
    stale.mkdir()
    (stale / "half").write_text("x", encoding="utf-8")
    (disk(root, tmp_path) / "notes.txt").write_text("mine", encoding="utf-8")
    prune(root, 2, step_name(5))
    names = [one.name for one in root.children()]
    # 25 is newer than every whole one: a writer may be busy with it.
    assert names == ["notes.txt", "step_00000005", "step_00000020", "step_00000025"]


def test_prune_without_a_limit_only_cleans(root: Place, folder: Path, tmp_path: Path) -> None:
    save(root, folder, 5, 10)
    (disk(root, tmp_path) / "step_00000005" / COMPLETE).unlink()
    assert prune(root, None, None) == []
    assert len(root.children()) == 2


def test_another_branch_forgets_the_later_checkpoints(root: Place, folder: Path) -> None:
    save(root, folder, 5, 10, 20)
    assert forget_after(root, 5) == ["step_00000010", "step_00000020"]
    assert [one.name for one in root.children()] == ["step_00000005"]


def test_paths_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert place("~/runs").local_path == tmp_path / "runs"
    assert place("runs/../x").local_path == tmp_path / "x"
    assert place("x", base=tmp_path / "base").local_path == tmp_path / "base" / "x"
    assert place(f"file://{tmp_path}/y").local_path == tmp_path / "y"
    odd = place(tmp_path / "a b%20c")
    assert place(odd.child("d").uri).local_path == tmp_path / "a b%20c" / "d"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3:bucket/runs", "write s3://bucket/runs"),
        ("gs:/bucket", "write gs://bucket"),
        ("~nobody-here/runs", "a user that this machine does not have"),
        ("s3://[::1/runs", "This is no URI"),
        ("file://runs", "file:///folder with its whole path"),
    ],
)
def test_what_is_nearly_a_place_is_refused(text: str, words: str) -> None:
    with pytest.raises(Refused) as caught:
        place(text)
    assert words in str(caught.value)


def test_a_name_with_a_colon_is_a_folder(tmp_path: Path) -> None:
    assert place("run:1", base=tmp_path).local_path == tmp_path / "run:1"
    assert place("./s3:x", base=tmp_path).local_path == tmp_path / "s3:x"


def test_an_object_stores_uri_opens_its_children() -> None:
    bucket = place("s3://bucket/runs?region=eu-west-1&endpoint_override=localhost:1&scheme=http")
    below = bucket.child("checkpoints", "step 5")
    assert (
        below.uri == "s3://bucket/runs/checkpoints/step%205?region=eu-west-1&endpoint_override=localhost:1&scheme=http"
    )
    assert place(below.uri).path == below.path
    assert below.local_path is None


def test_google_clouds_uri_opens_its_children() -> None:
    """Nothing is said to a server until something is read."""
    options = "scheme=http&endpoint_override=localhost:1&retry_limit_seconds=3"
    bucket = place(f"gs://anonymous@bucket/runs?{options}")
    below = bucket.child("checkpoints", "step 5")
    assert bucket.filesystem.type_name == "gcs"
    assert below.uri == f"gs://anonymous@bucket/runs/checkpoints/step%205?{options}"
    assert place(below.uri).path == below.path == "bucket/runs/checkpoints/step 5"


@pytest.mark.parametrize("uri", ["foo://bucket/x", "s3://", "hdfs://nowhere.invalid:1/x"])
def test_what_cannot_be_opened_is_one_sentence(uri: str) -> None:
    with pytest.raises(Refused) as refusal:
        place(uri)
    assert uri in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_password_in_a_uri_is_refused_and_not_shown() -> None:
    with pytest.raises(Refused, match="password") as refusal:
        place("s3://key:hunter2@bucket/x")
    assert "hunter2" not in str(refusal.value)


def test_a_checkpoints_name_says_its_step(tmp_path: Path) -> None:
    assert step_of(place(tmp_path / step_name(12))) == 12
    with pytest.raises(Refused, match="not a checkpoint"):
        step_of(place(tmp_path / "model"))
