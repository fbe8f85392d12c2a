"""What of the stack is on this machine."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from tunefleet.hardware import local_cpu, local_gpu

_NEEDED = (
    *("ray", "torch", "transformers", "peft", "pyarrow", "deepspeed", "galore-torch", "badam", "datasets"),
    *("pydantic", "typer", "rich", "tensorboard", "matplotlib"),
)
_LOW_DISK_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    name: str
    value: str
    ok: bool


def examine() -> list[Finding]:
    """Look at versions, devices and room; starts nothing."""
    return [_python(), *(_package(name) for name in _NEEDED), *_devices(), _disk(), _ray_address()]


def _python() -> Finding:
    return Finding("python", sys.version.split()[0], sys.version_info >= (3, 11))


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name), True)
    except PackageNotFoundError:
        return Finding(name, f"missing: pip install {name}", False)


def _devices() -> list[Finding]:
    hardware = local_gpu() or local_cpu()
    memory = psutil.virtual_memory()
    findings = [
        Finding("cpu", f"{psutil.cpu_count()} cores, {memory.total / 2**30:.0f} GiB of memory", True),
        Finding("trains on", hardware.device, True),
        Finding("bf16", "in hardware" if hardware.bf16 else "not in hardware: runs use fp32", True),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        findings.append(Finding(f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", True))
    return findings


def _disk() -> Finding:
    free = shutil.disk_usage(Path.home()).free
    return Finding("disk", f"{free / 2**30:.0f} GiB free at home", free > _LOW_DISK_BYTES)


def _ray_address() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    return Finding("ray cluster", address or "none named: runs start Ray on this machine", True)
