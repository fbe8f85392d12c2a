"""Where a rank's time of an update goes: waiting for data, or its own work. What is left is waiting for other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from tunefleet.data.batches import Batch
from tunefleet.training.step import Pace


class Stopwatch:
    """Times one update on one rank.

    Work is wall time on a CPU and device time on a GPU, whose kernels run behind the program. An engine in lockstep
    waits for other ranks inside its passes: on a CPU, where a thread that waits uses none, the thread's own CPU time is
    the work; on a GPU there is no such clock.
    """

    def __init__(self, device: torch.device, *, lockstep: bool) -> None:
        self.device, self._lockstep = device, lockstep
        self._tokens = 0
        self._data_wait_seconds = 0.0
        self._cpu_seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same micro-batches, the time that each takes to come added up."""
        source = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(source, None)
            self._data_wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            self._tokens += batch.tokens
            yield batch

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Add up what the passes within the block take."""
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._marks.append((start, end))
            return
        clock = time.thread_time if self._lockstep else time.perf_counter
        began = clock()
        yield
        self._cpu_seconds += clock() - began

    def pace(self) -> Pace:
        """What was measured. To be asked when the device has done the update."""
        return Pace(self._tokens, self._data_wait_seconds, self._compute_seconds())

    def _compute_seconds(self) -> float | None:
        if self.device.type != "cuda":
            return self._cpu_seconds
        if self._lockstep:
            return None
        milliseconds: float = sum(start.elapsed_time(end) for start, end in self._marks)
        return milliseconds / 1e3
