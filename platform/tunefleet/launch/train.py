"""One training run from the driver's side: plan it, claim its folder, run it under Ray Train, bring the result home."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.trackers.tracker import refuse_missing
from tunefleet.checkpoints import newest_complete, step_of
from tunefleet.errors import BrokenOff, RunFailed
from tunefleet.launch.cluster import cluster_address, joined_shape, local_shape, ray_session
from tunefleet.launch.display import Display
from tunefleet.launch.draft import draft
from tunefleet.launch.fit import start_fit
from tunefleet.launch.growth import Growth
from tunefleet.launch.home import bring_home, refuse_foreign_output, refuse_unusable, refuse_unwritable
from tunefleet.launch.placement import away_from
from tunefleet.launch.runs import claimed, clear_notes, open_run
from tunefleet.launch.signals import StopWish, stop_wishes
from tunefleet.launch.verdict import news_of_a_move
from tunefleet.launch.waiting import Waiting
from tunefleet.models import check_weights
from tunefleet.plan import Plan
from tunefleet.recipe.sections import Recipe
from tunefleet.storage import Place, place
from tunefleet.worker.events import Event, Started
from tunefleet.worker.job import JobConfig
from tunefleet.worker.mailbox import collect, open_mailbox

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    plan: Plan
    run: Place
    output_dir: Path
    summary: dict[str, Any]
    """What rank 0 returned: steps, losses, tokens per second, fingerprints."""
    exit_code: int
    """0 finished, 130 or 143 stopped by a signal with a checkpoint."""


def train(recipe: Recipe, display: Display, root: Path) -> Outcome:
    """Run a recipe to its end, or until a signal stops it.

    Args:
        root: the folder that relative paths of the recipe start from.

    Raises:
        Refused: the recipe cannot run; nothing was started.
        RunFailed: the run came to grief.
        BrokenOff: a second signal came.
    """
    refuse_missing(recipe.run.report_to)
    with ExitStack() as stack:
        joins = cluster_address(recipe.ray) is not None
        if joins:
            stack.enter_context(ray_session(recipe.ray))
        cluster = joined_shape(recipe.ray) if joins else local_shape(recipe.ray)
        storage = place(recipe.ray.ray_storage_path, base=root)
        refuse_unusable(storage, "ray_storage_path")
        with display.preparing() as stages:
            plan = draft(recipe, cluster, root, stages)
        check_weights(recipe.model)
        folder = RunFolder(storage.child(plan.place.run_name))
        output_dir = (root / Path(plan.place.output_dir).expanduser()).resolve()
        refuse_foreign_output(output_dir, folder, recipe.run.overwrite_output_dir)
        refuse_unwritable(output_dir, "output_dir")
        mark = stack.enter_context(claimed(folder))
        notices = open_run(plan, folder)
        for text in (*plan.notices, *notices):
            display.note(text)
        stack.enter_context(display)
        if not joins:
            stack.enter_context(ray_session(recipe.ray))
        wish = stack.enter_context(stop_wishes())  # after Ray has started, which sets an answer to SIGTERM of its own
        try:
            summary = _fit(plan, storage, folder, mark, display, wish)
        except KeyboardInterrupt as error:
            raise BrokenOff(f"Broken off: {_what_is_left(folder)}.") from error
        except RayError as error:  # as when a signal to the whole process group ends Ray's processes too
            raise RunFailed(f"Ray ended during the run, which was broken off: {_what_is_left(folder)}.") from error
        if not summary["stopped"]:
            bring_home(folder, output_dir, recipe.run.plot_loss)
        return Outcome(plan, folder.root, output_dir, summary, wish.exit_code if summary["stopped"] else 0)


def _fit(plan: Plan, storage: Place, folder: RunFolder, mark: str, display: Display, wish: StopWish) -> dict[str, Any]:
    """Run the workers; show what they tell; pass a wish to stop on to them."""
    running = Running(plan, storage, folder, shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), mark)
    told = False
    while running.goes_on():
        for event in running.events():
            display.show(event)
        if wish.signal is not None and not told:
            display.note("stopping: the workers save a checkpoint at the next step (once more to break off at once)")
            running.stop()
            told = True
    for event in running.events():
        display.show(event)
    return running.summary()


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


def _what_is_left(folder: RunFolder) -> str:
    """What a run that was broken off goes on from."""
    newest, _ = newest_complete(folder.checkpoints)
    if newest is None:
        return "there is no checkpoint yet, so the same command begins anew"
    return f"the same command goes on from step {step_of(newest)}"
