"""TensorBoard events of a run, always in agreement with its `metrics.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tunefleet.artifacts.metrics import Line, scalars


class Curves:
    """Writes one event file that holds the whole run: its history first, then each line as it comes.

    Earlier event files are emptied, not removed: a page that has one open would wait for it forever. The session mark
    tells that page to forget what it has shown.
    """

    def __init__(self, folder: Path, history: Iterable[Line]) -> None:
        for old in folder.glob("events.out.tfevents.*"):
            old.write_bytes(b"")
        self._writer = EventFileWriter(str(folder))
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=0, session_log=start))
        for line in history:
            self._add(line)
        self._writer.flush()

    def write(self, line: Line) -> None:
        """Add a line, on disk when this returns."""
        self._add(line)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, line: Line) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line).items()]
        self._writer.add_event(Event(wall_time=time.time(), step=int(line["step"]), summary=Summary(value=values)))
