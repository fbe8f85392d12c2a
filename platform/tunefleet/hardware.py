"""What this machine has: what its device can do with numbers, and whose its disks are.

Asked in every Ray cluster, so it must not load torch for a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

NETWORK_DISKS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs"})
"""What file systems of other machines call themselves; those of user space are named fuse.something."""

_CPU_FACTS = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_tile"}


@dataclass(frozen=True)
class Hardware:
    """A kind of device."""

    device: Literal["cpu", "cuda"]
    bf16: bool
    """Whether it multiplies bf16 matrices natively; without it bf16 is emulated and slower than fp32."""


def local_cpu() -> Hardware:
    """This machine's processor."""
    return Hardware("cpu", not _BF16_FLAGS.isdisjoint(_cpu_flags()))


def local_gpu() -> Hardware | None:
    """This machine's GPU, if it has one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return Hardware("cuda", torch.cuda.is_bf16_supported(including_emulation=False))


def _cpu_flags() -> set[str]:
    """The instruction sets of the first core, by Linux's names; empty where they cannot be asked."""
    if not _CPU_FACTS.is_file():
        return set()
    lines = _CPU_FACTS.read_text(encoding="utf-8").splitlines()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def on_network(path: Path) -> bool:
    """Whether a path, there or not yet, is on a mounted disk of another machine."""
    kinds = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    whole = path.resolve()
    kind = next((kinds[str(parent)] for parent in (whole, *whole.parents) if str(parent) in kinds), "")
    return kind in NETWORK_DISKS or kind.startswith("fuse.")
