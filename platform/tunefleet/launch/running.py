"""A run under way from its driver's side, whoever that is: a command, or a trial of a search."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ray

from tunefleet.artifacts.folder import RunFolder
from tunefleet.launch.fit import start_fit
from tunefleet.launch.growth import Growth
from tunefleet.launch.placement import away_from
from tunefleet.launch.runs import clear_notes
from tunefleet.launch.verdict import news_of_a_move
from tunefleet.launch.waiting import Waiting
from tunefleet.plan import Plan
from tunefleet.storage import Place
from tunefleet.worker.events import Event, Started
from tunefleet.worker.job import JobConfig
from tunefleet.worker.mailbox import collect, open_mailbox

_POLL_SECONDS = 0.2


class Running:
    """A run under way: its workers train, and this process hears of it."""

    def __init__(
        self, plan: Plan, storage: Place, folder: RunFolder, command: str, mark: str, until: int | None = None
    ) -> None:
        """Start the workers of a run whose folder is claimed and open.

        Args:
            command: what repeats the run.
            mark: what `claimed` yielded.
            until: the step after which they save and leave, with `stopped` in their summary; None = the run's end.
        """
        self._plan, self._storage, self._folder, self._mark = plan, storage, folder, mark
        self._mailbox = open_mailbox()
        self._config: JobConfig = {
            "plan": plan.model_dump_json(),
            "run": folder.root.uri,
            "mailbox": self._mailbox,
            "command": command,
            "mark": mark,
            "until": until,
        }
        self._waiting = Waiting(plan)
        self._growth = Growth(plan.workers, plan.recipe.ray.elastic_resize_monitor_interval_s)
        self._told: list[Event] = []
        self._left: set[str] = set()
        self._stopping = False
        self._fit = start_fit(plan, storage, self._config)

    def goes_on(self, seconds: float = _POLL_SECONDS) -> bool:
        """Wait for the run's end, but not longer than `seconds`. Returns whether it still goes on.

        Ray starts failed attempts anew, as often as `max_failures` says. An attempt that left early because the run
        must go on elsewhere (`worker/leaving.py`) has not failed: the next one is started here, and nothing is counted.

        Raises:
            RunFailed: the cluster has had no room for the workers for too long.
        """
        self._fit.join(seconds)
        self._waiting.look()
        if self._fit.is_alive():
            if not self._stopping and self._growth.is_due():
                self._mailbox.want.remote("grow")
            return True
        ending = self._fit.ending()
        if ending is None or not ending.get("moved") or self._stopping:
            return False
        self._told.append(news_of_a_move(ending))
        self._growth.moved()
        self._waiting = Waiting(self._plan)
        clear_notes(self._folder)
        ray.get(self._mailbox.want.remote(None))
        self._fit = start_fit(away_from(self._left, self._plan), self._storage, self._config)
        return True

    def events(self) -> list[Event]:
        """What the workers have told since the last time, oldest first."""
        told, self._told = [*self._waiting.heard(collect(self._mailbox)), *self._told], []
        for event in told:
            if isinstance(event, Started):
                self._growth.started(event.world_size)
        return told

    def stop(self) -> None:
        """Ask the workers to save a checkpoint at the next step and to end."""
        self._stopping = True
        self._mailbox.want.remote("stop")

    def move(self, nodes: Collection[str]) -> None:
        """Ask the workers to save a checkpoint at the next step, and to go on anywhere but on these nodes.

        Args:
            nodes: by Ray's names.
        """
        self._left |= set(nodes)
        self._mailbox.want.remote("move")

    def summary(self) -> dict[str, Any]:
        """What rank 0 returned; the line to the workers is closed.

        Raises:
            Refused: the workers found that the recipe cannot run.
            RunFailed: anything else went wrong.
        """
        ray.kill(self._mailbox)
        return self._fit.summary(self._folder, self._mark)
