"""The host of warm trials: an actor of Ray Tune that sits in a worker's place and takes trial after trial.

Its placement group is the one that Ray Train would ask for (`launch/placement.py`): one bundle, a worker's. What trains
there is a fork (`forks.py`) with the host's environment, which dies with the host; the host itself loads nothing of
what trains. Trials that cannot be warm are driven by the same actor class as any other search drives them, from a
driver's seat, which no warm trial ever gets: Tune keeps actors apart by what they hold.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.tune import PlacementGroupFactory, Trainable

from tunefleet.errors import RunFailed
from tunefleet.search.board import Progress
from tunefleet.search.warm.forks import Stock, TrialOrder, fork, fork_server, last_words, machine
from tunefleet.worker.exits import end_surely
from tunefleet.worker.gauges import RayMetrics

WARM = "warm"
"""The key of a warm trial's configuration that holds its placement group, `bundles` and `strategy`."""
_FAREWELL_SECONDS = 90.0
"""How long a trial that shall end may take; its worker has a minute of it to save."""


@dataclass(frozen=True)
class Hosts:
    """What hosts start with."""

    stock: Stock
    """What a fork server is made ready for."""
    address: str | None = None
    """Of the driver's fork server."""
    machine: str | None = None
    """Where that is (`forks.machine`)."""


class Driving(Protocol):
    """A trial as a host drives it (`driven.Driven`)."""

    def next_result(self) -> dict[str, Any]: ...
    def pointer(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


def place_of(config: dict[str, Any], driver: PlacementGroupFactory) -> PlacementGroupFactory:
    """What a trial's actor holds: a worker's place, or else that of a driver."""
    return PlacementGroupFactory(**config[WARM]) if WARM in config else driver


class HostTrial(Trainable):
    """What Ray Tune starts for a trial, and gives another one when that has ended."""

    def setup(
        self,
        config: dict[str, Any],
        search: str = "",
        board: Any = None,
        evaluates: bool = True,
        interval: int = 1,
        hosts: Hosts | None = None,
    ) -> None:
        """Become a host, and take a trial. Arguments as those of `search.trial.RunTrial`."""
        end_surely()
        assert hosts is not None
        self._search, self._board, self._evaluates, self._interval = search, board, evaluates, interval
        self._hosts = hosts
        self._address: str | None = hosts.address if hosts.machine == machine() else None
        self._held = ExitStack()
        self._config = config
        self._trial: Driving | None = self._take()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self._end()
        self._config = new_config
        self._trial = self._take()
        return True

    def step(self) -> dict[str, Any]:
        """Go on until the run has a new value of the metric, or its end."""
        self._trial = self._trial or self._take()
        return self._trial.next_result()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Leave a pointer: the run keeps its own checkpoints, and goes on from the newest.

        Tune asks for it when it pauses the trial, which may go on in another host before this one hears of it.
        """
        pointer = {} if self._trial is None else self._trial.pointer()
        (Path(checkpoint_dir) / "run.json").write_text(json.dumps(pointer))
        self._end()

    def load_checkpoint(self, checkpoint: Any) -> None:
        """The run finds its newest checkpoint by itself."""

    def cleanup(self) -> None:
        """Tune needs the host no more."""
        self._end()
        self._held.close()

    def _end(self) -> None:
        if self._trial is not None:
            self._trial.close()
            self._trial = None

    def _take(self) -> Driving:
        name = self._config["trial"]
        if WARM in self._config:
            return self._fork(name)
        from tunefleet.search.trial import driven  # loads what trains, for seconds

        return driven(name, self._search, self._board, self._evaluates, self._interval)

    def _fork(self, name: str) -> WarmTrial:
        """A fork for a trial: of the driver's server if that is on this machine and lives, else of the host's own."""
        if self._address is not None:
            try:
                return WarmTrial(self._order(name, self._address), self._board)
            except RunFailed:
                self._held.close()
        server = self._held.enter_context(fork_server())
        server.keep(self._hosts.stock)
        self._address = server.address
        return WarmTrial(self._order(name, self._address), self._board)

    def _order(self, name: str, address: str) -> TrialOrder:
        node_id = ray.get_runtime_context().get_node_id()
        return TrialOrder(name, self._search, self._evaluates, self._interval, address, node_id, dict(os.environ))


class WarmTrial:
    """A trial in a fork, as its host sees it."""

    def __init__(self, order: TrialOrder, board: Any) -> None:
        self._order, self._board = order, board
        self._fork = fork(order.address, "trial", order)
        self._metrics = RayMetrics(order.name, 0, os.uname().nodename)
        self._pointer: dict[str, Any] = {}
        self._over = False

    def next_result(self) -> dict[str, Any]:
        """Ask for the next result and wait for it; meanwhile tell the search how far the trial is.

        Raises:
            RunFailed: the trial came to grief, or its process was lost.
        """
        try:
            self._fork.line.send("next")
            while True:
                kind, told = self._fork.line.recv()
                if kind == "progress":
                    self._pass_on(*told)
                elif kind == "result":
                    self._pointer = told.pop("pointer")
                    return dict(told)
                else:
                    raise RunFailed(told)
        except (EOFError, OSError) as error:
            self._over = True
            lost = f"The process of trial {self._order.name} was lost{last_words(self._order.address)}"
            raise RunFailed(f"{lost}: it goes on from its newest checkpoint.") from error

    def _pass_on(self, progress: dict[str, Any] | None, figures: dict[str, float]) -> None:
        self._metrics.show(figures)
        seen = None if progress is None else Progress(**progress)
        if ray.get(self._board.tell.remote(self._order.name, seen)).stop:
            self._fork.line.send("stop")

    def pointer(self) -> dict[str, Any]:
        """Where the run is, and how far."""
        return self._pointer

    def close(self) -> None:
        """Let the trial end, with a checkpoint if it trains, and wait for that."""
        until = time.monotonic() + _FAREWELL_SECONDS
        try:
            self._fork.line.send("stop")
            while not self._over and self._fork.line.poll(max(0.0, until - time.monotonic())):
                self._fork.line.recv()
        except (EOFError, OSError):
            self._over = True
        if not self._over:
            self._fork.signal(signal.SIGKILL)
        self._fork.line.close()
