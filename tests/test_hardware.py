"""Whose disk a path is on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tunefleet.hardware import on_network


@pytest.mark.parametrize(
    ("kind", "remote"),
    [("nfs4", True), ("fuse.s3fs", True), ("lustre", True), ("ext4", False), ("overlay", False), ("tmpfs", False)],
)
def test_the_innermost_mount_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, remote: bool) -> None:
    mounts = [("/", "ext4" if remote else "nfs4"), (str(tmp_path.resolve()), kind)]

    def partitions(**_options: bool) -> list[SimpleNamespace]:
        return [SimpleNamespace(mountpoint=where, fstype=what) for where, what in mounts]

    monkeypatch.setattr("psutil.disk_partitions", partitions)
    assert on_network(tmp_path / "not" / "there") is remote
    assert on_network(tmp_path.parent) is not remote


def test_the_disks_of_this_machine_can_be_asked(tmp_path: Path) -> None:
    assert on_network(tmp_path) in (True, False)
