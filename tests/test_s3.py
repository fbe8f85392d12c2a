"""Places in a bucket of a real S3 server: what goes wrong there, and what must not be lost or believed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from tests.s3_server import Server, Way, uri

from tunefleet.checkpoints import download_newest, newest_complete, prune, step_name, step_of
from tunefleet.errors import Refused
from tunefleet.storage import COMPLETE, Place, place
from tunefleet.stores import StoreFailed, for_ray


@pytest.fixture
def name(server: Server) -> str:
    """A bucket of this test's own."""
    made = f"b{uuid.uuid4().hex}"
    server.bucket(made)
    return made


@pytest.fixture
def root(name: str, server: Server) -> Place:
    return place(uri(f"{name}/run/checkpoints", server.host))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "rank").mkdir(parents=True)
    (source / "weights.bin").write_bytes(os.urandom(12 * 2**20))  # more than one part of an upload in parts
    (source / "rank" / "0.txt").write_text("zero", encoding="utf-8")
    return source


def test_a_checkpoint_goes_there_and_back(root: Place, folder: Path, tmp_path: Path) -> None:
    root.child(step_name(5)).upload(folder)
    root.child(step_name(10)).upload(folder)
    found, notices = download_newest(place(root.uri), tmp_path / "back")
    assert found is not None
    assert (step_of(found), notices) == (10, [])
    assert (tmp_path / "back" / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()
    assert prune(root, 1, None) == [step_name(5)]
    assert [one.name for one in root.children()] == [step_name(10)]


def test_a_server_that_goes_away_during_an_upload_is_waited_for(
    name: str, server: Server, way: Way, folder: Path
) -> None:
    target = place(uri(f"{name}/checkpoints/{step_name(5)}", way.host))
    way.refused_bytes_from = 6 * 2**20  # in the middle of the weights
    upload = threading.Thread(target=lambda: target.upload(folder))
    upload.start()
    while not way.is_cut:
        time.sleep(0.02)
    time.sleep(2)
    assert upload.is_alive()
    assert f"checkpoints/{step_name(5)}/{COMPLETE}" not in server.objects(name)
    way.mend()
    upload.join(60)
    assert not upload.is_alive()
    assert place(uri(f"{name}/checkpoints/{step_name(5)}", server.host)).problem(hashes=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("away", ["cut", "silent"])
def test_half_a_minute_without_the_server(name: str, server: Server, way: Way, folder: Path, away: str) -> None:
    """Cut: connections are refused. Silent: they are taken, and nothing answers."""
    target = place(uri(f"{name}/checkpoints/{step_name(5)}", way.host))
    way.refused_bytes_from = 6 * 2**20
    upload = threading.Thread(target=lambda: target.upload(folder))
    upload.start()
    while not way.is_cut:
        time.sleep(0.02)
    if away == "silent":
        way.mend()
        way._lock.acquire()
    time.sleep(30)
    assert upload.is_alive()
    if away == "silent":
        way._lock.release()
    else:
        way.mend()
    upload.join(60)
    assert not upload.is_alive()
    assert place(uri(f"{name}/checkpoints/{step_name(5)}", server.host)).problem(hashes=True) is None


def test_patience_ends(name: str, way: Way, folder: Path) -> None:
    way.cut()
    target = Place(**{**vars(place(uri(f"{name}/x", way.host))), "patience_seconds": 1.0})
    with pytest.raises(StoreFailed, match=r"out of reach for 1 s \(NETWORK_CONNECTION.*same command goes on"):
        target.upload(folder)


def test_a_killed_writer_leaves_nothing_that_counts(
    root: Place, folder: Path, name: str, server: Server, way: Way
) -> None:
    root.child(step_name(5)).upload(folder)
    os.truncate(folder / "weights.bin", 2**40)  # sparse: it never arrives
    script = "import sys; from pathlib import Path; from tunefleet.storage import place; "
    script += "place(sys.argv[1]).upload(Path(sys.argv[2]))"
    target = uri(f"{name}/run/checkpoints/{step_name(10)}", way.host)
    writer = subprocess.Popen([sys.executable, "-c", script, target, folder])
    try:
        while way.passed_bytes < 20 * 2**20:
            assert writer.poll() is None
            time.sleep(0.02)
    finally:
        writer.kill()
        writer.wait()
    found, _ = newest_complete(root)
    assert found is not None
    assert step_of(found) == 5
    assert f"run/checkpoints/{step_name(10)}/weights.bin" not in server.objects(name)


@pytest.mark.parametrize("harm", ["truncated", "gone", "unsealed"])
def test_what_is_not_whole_is_passed_over(
    root: Place, folder: Path, name: str, server: Server, tmp_path: Path, harm: str
) -> None:
    root.child(step_name(5)).upload(folder)
    root.child(step_name(10)).upload(folder)
    key = f"run/checkpoints/{step_name(10)}/{COMPLETE if harm == 'unsealed' else 'weights.bin'}"
    if harm == "truncated":
        server.client().put_object(Bucket=name, Key=key, Body=(folder / "weights.bin").read_bytes()[: 2**20])
    else:
        server.client().delete_object(Bucket=name, Key=key)
    found, notices = download_newest(root, tmp_path / "back")
    assert found is not None
    assert step_of(found) == 5
    assert len(notices) == 1


def test_an_upload_that_arrives_truncated_is_not_sealed(root: Place, folder: Path, name: str, server: Server) -> None:
    target = root.child(step_name(5))
    staging = target.staging()
    part = staging.fill(folder)
    key = f"run/checkpoints/{step_name(5)}/weights.bin"
    server.client().put_object(Bucket=name, Key=key, Body=b"short")
    with pytest.raises(Exception, match=r"weights\.bin has 5 bytes instead of"):
        target.seal(staging, [part])
    assert target.problem() is not None


def test_rays_own_notes_wait_too(name: str, server: Server, way: Way) -> None:
    opened = place(uri(f"{name}/notes", way.host))
    notes = for_ray(opened.filesystem)
    way.cut()
    threading.Timer(2, way.mend).start()
    with notes.open_output_stream(f"{name}/notes/snapshot.json") as stream:
        stream.write(b"{}")
    assert server.objects(name) == {"notes/snapshot.json": 2}
    with notes.open_input_stream(f"{name}/notes/snapshot.json") as stream:
        assert stream.read() == b"{}"


# ---- what is refused before anything begins --------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(server: Server) -> None:
    with pytest.raises(StoreFailed, match=r"no-such-bucket/runs\S* is in a bucket that does not exist: make"):
        place(uri("no-such-bucket/runs", server.host)).try_out()


def test_wrong_credentials(name: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    server.demand_credentials()
    try:
        with pytest.raises(StoreFailed, match=r"refused by its store .*AWS_ACCESS_KEY_ID") as caught:
            place(uri(f"{name}/runs", server.host)).try_out()
    finally:
        server.demand_credentials(after=10**9)
    assert "another" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_is_not_there(way: Way, name: str) -> None:
    way.cut()
    with pytest.raises(StoreFailed, match=r"out of reach for \d+ s"):
        place(uri(f"{name}/runs", way.host)).try_out(15.0)


def test_the_environments_endpoint_is_written_into_the_uri(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the workers, who have another environment, go to the same server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.host}")
    there = place(f"s3://{name}/runs?region=us-east-1")
    there.child("note").write_text("here")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert place(there.uri).child("note").read_text() == "here"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://key:hunter2@{server.host}")
    with pytest.raises(Refused, match="credentials") as caught:
        place(f"s3://{name}/runs")
    assert "hunter2" not in str(caught.value)
