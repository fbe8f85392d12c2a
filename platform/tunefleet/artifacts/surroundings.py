"""What a run stood on: versions, commit, hardware. Never environment variables, which hold secrets."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

STACK = (
    "tunefleet",
    "torch",
    "transformers",
    "peft",
    "ray",
    "numpy",
    "pyarrow",
    "tokenizers",
    "safetensors",
    "accelerate",
    "deepspeed",
    "galore-torch",
    "badam",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)


@cache
def versions() -> dict[str, str | None]:
    """Python and the stack; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in STACK:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_commit(folder: Path) -> str | None:
    """The commit that a folder stands at, with `-dirty` behind it if tracked files differ; None without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def host_facts() -> dict[str, str | int | list[str]]:
    """The machine as numbers depend on it."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
    }


def _processor() -> str:
    """The CPU's model name, on which the last bit of a sum depends."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
