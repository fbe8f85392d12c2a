"""Lines on their way to a tracker, in a thread of their own: training waits for no network.

`metrics.jsonl` is the truth, and goes back to the checkpoint when a run is resumed; what a tracker has been given
cannot be taken back. So the lines go to it in order, and of each curve only the steps behind the last that it has:

- lines of the record that the tracker has not got (lost on the way when a worker was killed, or while the tracker was
  down) are brought after;
- steps that are taken again after a resume are there already, with the same values: at the same number of workers they
  are equal bit for bit but for the clock's.

What the tracker has is asked of the tracker itself, when it is opened and again after each failure, as nobody else
knows whether a request that failed was carried out.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable

from tunefleet.artifacts.metrics import Line, scalars
from tunefleet.artifacts.trackers.tracker import End, Tracker
from tunefleet.errors import first_line

RETRY_SECONDS = 30.0
"""From a failure to the next try."""
PATIENCE_SECONDS = 60.0
"""For the last lines of a finished run to arrive, at a tracker that works."""
IMPATIENCE_SECONDS = 5.0
"""At one that failed when it was tried last; and when the run will go on, which then brings what is missing."""

_SECRET_NAME = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$")


class Delivery:
    """Brings a run's lines to one tracker."""

    def __init__(self, tracker: Tracker, history: Iterable[Line], retry_seconds: float = RETRY_SECONDS) -> None:
        """
        Args:
            history: the lines of the record so far.
        """
        self._tracker, self._retry_seconds = tracker, retry_seconds
        self._waiting = deque(history)
        self._changed = threading.Condition()
        self._end: End | None = None
        self._opened = self._failing = self._complained = False
        self._complaints: list[str] = []
        self._thread = threading.Thread(target=self._run, name=f"to {tracker.name}", daemon=True)
        self._thread.start()

    def write(self, line: Line) -> None:
        """Take a line. Never waits for the tracker."""
        with self._changed:
            self._waiting.append(line)
            self._changed.notify()

    def complaints(self) -> list[str]:
        """What has gone wrong since the last time; that a tracker is down is said once."""
        said, self._complaints = self._complaints, []
        return said

    def close(self, end: End) -> None:
        """Bring the last lines and say how the attempt ended, as long as patience lasts."""
        if self._end is not None:
            return
        with self._changed:
            self._end = end
            self._changed.notify()
        patient = end == "finished" and not self._failing
        self._thread.join(PATIENCE_SECONDS if patient else IMPATIENCE_SECONDS)
        if self._waiting:
            self._complaints.append(
                f"{len(self._waiting)} lines have not arrived at {self._tracker.name}; metrics.jsonl holds all of them."
            )

    def _run(self) -> None:
        end: End | None = None
        while end is None:
            end = self._end  # read first: what was written before the end is then delivered below
            self._failing = not self._succeeds(self._deliver)
            if end is None:
                self._pause()
        if not self._failing:
            self._succeeds(lambda: self._tracker.close(end))

    def _pause(self) -> None:
        """Until there is something to do; after a failure for some time."""
        with self._changed:
            if self._failing:
                self._changed.wait_for(lambda: self._end is not None, self._retry_seconds)
            else:
                self._changed.wait_for(lambda: self._end is not None or len(self._waiting) > 0)

    def _deliver(self) -> None:
        if not self._opened:
            self._tracker.open()
            self._opened = True
        while self._waiting:
            line = self._waiting[0]
            step = int(line["step"])
            new = {curve: number for curve, number in scalars(line).items() if step > self._tracker.reached(curve)}
            if new:
                self._tracker.write(step, new)
            self._waiting.popleft()

    def _succeeds(self, call: Callable[[], None]) -> bool:
        """Call something that must not end the run, whatever it raises."""
        try:
            call()
        except Exception as error:  # said once; training goes on
            self._opened = False
            if not self._complained:
                self._complained = True
                said = without_credentials(first_line(error).rstrip(":"))
                self._complaints.append(
                    f"{self._tracker.name} takes no lines ({said}); training goes on, and it is tried again."
                )
            return False
        return True


def without_credentials(text: str) -> str:
    """The text without what gives access: the user in a URL, and values of variables that are named like secrets."""
    text = re.sub(r"//[^/@\s]+@", "//", text)
    for name, value in os.environ.items():
        if value and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, "(hidden)")
    return text
