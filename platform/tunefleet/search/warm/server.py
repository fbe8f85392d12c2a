"""The fork server: a process with one thread that has imported everything and holds the base model, and forks.

    python -P -m tunefleet.search.warm LISTENER

LISTENER is the number of an inherited socket. The first line of standard input says what to have ready; when it closes,
the server ends. Its forks do not: each ends when the one who asked for it does, whom it has a connection to.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import extract_model_from_parallel
from transformers.utils.logging import disable_progress_bar

from tunefleet import models
from tunefleet.artifacts.surroundings import versions
from tunefleet.collecting import collect_as_ever
from tunefleet.errors import Refused
from tunefleet.plan import Plan
from tunefleet.search.warm.trial import drive
from tunefleet.search.warm.worker import work
from tunefleet.training.flops import peak_flops
from tunefleet.training.schedule import build_scheduler
from tunefleet_strategies.contract import AttachContext
from tunefleet_strategies.errors import StrategyError

ROLES: Mapping[str, Callable[[Connection, Any], None]] = {"trial": drive, "worker": work}


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks, so the system buries them
    load_what_is_loaded_late()
    stock = sys.stdin.readline()
    if not stock:
        return
    make_ready([Plan.model_validate(plan) for plan in json.loads(stock)])
    refuse_threads()
    gc.freeze()  # what is here stays; looking at it again would only copy its pages in every fork
    while True:
        ready, _, _ = select.select([sys.stdin, listener], [], [])
        if sys.stdin in ready:
            return
        accepted, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _serve(Connection(accepted.detach()))
        accepted.close()


def load_what_is_loaded_late() -> None:
    """Load what trials import on their way, while the search is still being planned."""
    disable_progress_bar()  # a bar has a thread
    importlib.import_module("peft")  # seconds
    pa.array([0]).to_numpy()  # loads pandas, if it is there
    versions()


def make_ready(plans: Sequence[Plan]) -> None:
    """Load what the trials start from: what their methods need, and the base model, which stays for the forks.

    Args:
        plans: one of each kind of trial. They share their model, and where relative paths start.
    """
    root, settings = Path(plans[0].place.root), plans[0].recipe.model
    if root.is_dir():
        os.chdir(root)
    with suppress(Refused, StrategyError):  # the trials will say it
        for plan in plans:
            plan.recipe.method.attach(models.meta_model(settings), AttachContext(precision=plan.precision.resolved()))
            build_scheduler(torch.optim.SGD([torch.zeros(1)]), plan.recipe.training, 1)
        models.keep(settings)
    if any(plan.recipe.method.traits().trains_base for plan in plans):
        extract_model_from_parallel(torch.nn.Identity())  # a whole model's export asks DeepSpeed, which it loads
    for compute in {plan.precision.resolved().compute for plan in plans if measures_alone(plan)}:
        peak_flops(compute, "cpu")


def measures_alone(plan: Plan) -> bool:
    """Whether this process, which has one thread, may measure the processor's speed for a trial."""
    return plan.workers.device == "cpu" and plan.workers.threads == 1


def refuse_threads() -> None:
    """See that this process may be forked.

    Raises:
        SystemExit: it has several threads, or has touched CUDA.
    """
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
    if threads > 1 or torch.cuda.is_initialized():
        sys.exit(f"a process with {threads} threads, or with CUDA, cannot be forked")


def _serve(line: Connection) -> None:
    """The whole life of a fork."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        gc.unfreeze()
        collect_as_ever()
        role, order = line.recv()
        line.send(os.getpid())
        ROLES[role](line, order)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what was set up for the end of the server is the server's
