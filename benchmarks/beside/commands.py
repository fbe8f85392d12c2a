"""Runs one command as a user would and notes when each line of its output came."""

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

THREADS = 1
ENVIRONMENT: Mapping[str, str] = {
    "OMP_NUM_THREADS": str(THREADS),
    "MKL_NUM_THREADS": str(THREADS),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Timed:
    """One finished command: its wall time, and its lines with the second (from the start) at which each came."""

    wall_seconds: float
    lines: tuple[tuple[float, str], ...]

    def arrivals(self, beginning: str) -> list[float]:
        """Return the seconds at which lines with this beginning came."""
        return [second for second, text in self.lines if text.startswith(beginning)]


def run_timed(argv: list[str], log: Path, extra: Mapping[str, str]) -> Timed:
    """Run `argv` under ENVIRONMENT and `extra`, its output (both streams) into `log`.

    Raises:
        SystemExit: the command failed; the log's last lines are shown.
    """
    lines: list[tuple[float, str]] = []
    start = time.perf_counter()
    with subprocess.Popen(
        argv,
        env={**os.environ, **ENVIRONMENT, **extra},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        if process.stdout is not None:
            lines.extend((time.perf_counter() - start, line.rstrip("\n")) for line in process.stdout)
    wall_seconds = time.perf_counter() - start
    log.write_text("\n".join(text for _, text in lines))
    if process.returncode != 0:
        tail = "\n".join(text for _, text in lines[-15:])
        said = f"{Path(argv[0]).name} ended with code {process.returncode}; its whole output is in {log}."
        raise SystemExit(f"{tail}\n{said}")
    return Timed(wall_seconds, tuple(lines))
