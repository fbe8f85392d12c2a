"""A fork that drives one warm trial for its host: the driver of every trial, over attempts that are forks as well."""

from __future__ import annotations

import signal
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any

from tunefleet.artifacts.folder import RunFolder
from tunefleet.launch.runs import clear_notes
from tunefleet.launch.verdict import ending_of, news_of_a_move, summary_of
from tunefleet.plan import Plan
from tunefleet.search.board import Orders, Progress
from tunefleet.search.driven import Driven
from tunefleet.search.warm.forks import Fork, TrialOrder, fork, last_words, shared_folder
from tunefleet.search.warm.worker import Order, Word, take_environment
from tunefleet.storage import Place, place
from tunefleet.worker.events import Event, Lost

_LISTEN_SECONDS = 0.2


def drive(host: Connection, order: TrialOrder) -> None:
    """Drive a trial: each time the host asks, go on to the next result and tell it."""
    take_environment(order.environment)
    trial = _Trial(host, order)
    try:
        trial.go()
    except (EOFError, ConnectionError):
        pass  # the host has died
    except Exception as error:  # told, for Tune to begin the trial anew
        with suppress(OSError):
            host.send(("failed", str(error) or type(error).__name__))
    finally:
        trial.close()


class _Host:
    """The line to the host: it asks for a result (`next`), or wants the trial to save and end (`stop`)."""

    def __init__(self, line: Connection) -> None:
        self.line = line
        self.asked = self.stops = False

    def listen(self, seconds: float | None = 0.0) -> None:
        """Take in what has come; wait for something so long.

        Raises:
            EOFError: the host has died.
        """
        while self.line.poll(seconds):
            word = self.line.recv()
            self.asked |= word == "next"
            self.stops |= word == "stop"
            seconds = 0.0


class _Trial:
    """A trial and the attempt that is under way."""

    def __init__(self, host: Connection, order: TrialOrder) -> None:
        self._order = order
        self._host = _Host(host)
        self._run: ForkedRun | None = None
        self._driven = Driven(order.name, place(order.search), order.evaluates, order.interval, self._start, self._tell)

    def go(self) -> None:
        """Tell results until the last one, or until the host wants no more."""
        done = False
        while not done and self._is_asked():
            result = self._driven.next_result()
            self._tell(None)
            self._host.line.send(("result", {**result, "pointer": self._driven.pointer()}))
            done = bool(result.get("done"))

    def close(self) -> None:
        """End the attempt, with a checkpoint unless the host has died."""
        with suppress(EOFError, ConnectionError):
            self._driven.close()
        if self._run is not None:
            self._run.kill()

    def _is_asked(self) -> bool:
        """Wait until the host asks; until then the run goes on to its next result, and no further.

        The scheduler may have stopped the trial, of which a host that is kept for another trial hears nothing.
        """
        while not (self._host.asked or self._host.stops):
            if not self._driven.overhear():
                continue
            if self._run is not None:
                self._run.hold()
            self._host.listen(None)
        if self._run is not None:
            self._run.let_go()
        self._host.asked = False
        return not self._host.stops

    def _start(self, plan: Plan, storage: Place, folder: RunFolder, command: str, mark: str) -> ForkedRun:
        own = self._order
        shared = shared_folder(own.address)
        order = Order(plan.model_dump_json(), folder.root.uri, command, mark, shared, own.node_id, own.environment)
        self._run = ForkedRun(plan, folder, order, self._order.address, self._host)
        return self._run

    def _tell(self, progress: Progress | None) -> Orders:
        figures = {} if self._run is None else self._run.figures()
        self._host.line.send(("progress", (None if progress is None else asdict(progress), figures)))
        self._host.listen()
        return Orders(self._host.stops)


class ForkedRun:
    """A run whose attempts are forks (`driven.Run`). As Ray Train does, it begins failed ones anew."""

    def __init__(self, plan: Plan, folder: RunFolder, order: Order, address: str, host: _Host) -> None:
        self._folder, self._order, self._address, self._host = folder, order, address, host
        self._failures_left = plan.recipe.ray.max_failures  # below zero there is no end of them
        self._told: list[Event] = []
        self._figures: dict[str, float] = {}
        self._returned: object = None
        self._error: Exception | None = None
        self._stopping = self._over = self._held = False
        self._attempt = self._begin()

    def _begin(self) -> Fork:
        self._returned = self._error = None
        attempt = fork(self._address, "worker", self._order)
        if self._stopping:
            attempt.line.send("stop")
        return attempt

    def goes_on(self) -> bool:
        """Wait a little for words of the worker or of the host. Returns whether the run still goes on.

        Raises:
            EOFError: the host has died.
        """
        if self._over:
            return False
        if self._attempt.line in wait([self._attempt.line, self._host.line], _LISTEN_SECONDS):
            self._listen()
        self._host.listen()
        return not self._over

    def _listen(self) -> None:
        line = self._attempt.line
        try:
            while line.poll():
                self._take(line.recv())
        except (EOFError, ConnectionError):
            line.close()
            self._ended()

    def _take(self, word: Word) -> None:
        match word:
            case ("event", told):
                self._told.append(told)
            case ("figures", figures):
                tokens = self._figures.get("tokens", 0.0) + figures.get("tokens", 0.0)
                self._figures |= {**figures, "tokens": tokens}
            case ("ending", returned):
                self._returned = returned
            case ("failed", text):
                self._error = RuntimeError(text)

    def _ended(self) -> None:
        """The attempt is over: the run may be as well, or goes on in another attempt."""
        ending = ending_of(self._returned)
        if ending is not None and ending["moved"] and not self._stopping:
            self._told.append(news_of_a_move(ending))
            clear_notes(self._folder)
            self._attempt = self._begin()
        elif self._returned is not None:
            self._over = True
        else:
            self._told.append(Lost())
            self._error = self._error or RuntimeError(f"its process was lost{last_words(self._address)}")
            if self._failures_left == 0:
                self._over = True
                return
            self._failures_left -= 1
            self._attempt = self._begin()

    def events(self) -> list[Event]:
        """What the worker has told since the last time, oldest first."""
        told, self._told = self._told, []
        return told

    def figures(self) -> dict[str, float]:
        """What has changed of the figures for Ray's metrics since the last time."""
        figures, self._figures = self._figures, {}
        return figures

    def stop(self) -> None:
        """Ask the worker to save a checkpoint at the next step and to end."""
        self._stopping = True
        self.let_go()
        with suppress(OSError):
            self._attempt.line.send("stop")

    def move(self, nodes: Collection[str]) -> None:
        """Nothing: a fork is where its host is."""

    def summary(self) -> dict[str, Any]:
        """What the worker returned.

        Raises:
            Refused, RunFailed: as `summary_of`.
        """
        return summary_of(self._returned, self._error, self._folder, self._order.mark)

    def hold(self) -> None:
        """Let the worker rest where it is."""
        if not self._over and not self._held:
            self._attempt.signal(signal.SIGSTOP)
            self._held = True

    def let_go(self) -> None:
        """Let a worker that was held go on."""
        if self._held:
            self._attempt.signal(signal.SIGCONT)
            self._held = False

    def kill(self) -> None:
        """End the worker at once, if it is still there."""
        if not self._over:
            self._attempt.signal(signal.SIGKILL)
            self._over = True
