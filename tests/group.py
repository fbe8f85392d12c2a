"""Several processes that are the ranks of one group, without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.05
_PYTHON = (sys.executable, "-X", "faulthandler")


def run_group(
    commands: Sequence[Sequence[str]], *, seconds: float, environment: Mapping[str, str] | None = None
) -> None:
    """Run `python -m` with each rank's arguments until all have ended well.

    One that fails leaves the others waiting for it, so it ends them too. If time runs out, each tells where it stands.

    Args:
        commands: for each rank, the module and its arguments.
        seconds: how long the slowest may take.
        environment: variables beside this process's own.
    """
    path = os.pathsep.join(str(ROOT / part) for part in ("", "platform", "strategies"))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        ranks = [
            subprocess.Popen([*_PYTHON, "-m", *command], cwd=ROOT, env=variables, stderr=errors)
            for command, errors in zip(commands, said, strict=True)
        ]
        deadline = time.monotonic() + seconds
        try:
            while not all(rank.poll() == 0 for rank in ranks):
                assert not any(rank.poll() for rank in ranks), "a rank failed"
                if time.monotonic() > deadline:
                    for rank in ranks:
                        rank.send_signal(signal.SIGABRT)  # upon which the fault handler prints the stack of each thread
                    raise AssertionError(f"the ranks took longer than {seconds} s")
                time.sleep(_POLL_SECONDS)
        except AssertionError as error:
            time.sleep(1.0)  # those that hear of it may say so
            codes = [rank.poll() for rank in ranks]
            for errors in said:
                errors.seek(0)
            words = "\n".join(f"--- rank {rank}:\n{errors.read()[-3000:]}" for rank, errors in enumerate(said))
            raise AssertionError(f"{error}; exit codes {codes}\n{words}") from None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def end_rank() -> NoReturn:
    """End this process, a rank that has written all that it saw, at once.

    Taking a gloo group apart and ending the interpreter behind it was seen to hang for ever on both ranks of a group.
    A worker under Ray never gets there either: Ray ends its process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
