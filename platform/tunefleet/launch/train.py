"""One training run from the driver's side: plan it, claim its folder, run it under Ray Train, bring the result home."""

from __future__ import annotations

import shlex
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.result import Result

from tunefleet.artifacts.folder import RunFolder
from tunefleet.errors import BrokenOff, Refused, RunFailed
from tunefleet.launch.cluster import cluster_address, joined_shape, local_shape, ray_session
from tunefleet.launch.display import Display
from tunefleet.launch.draft import draft
from tunefleet.launch.home import bring_home, refuse_foreign_output, refuse_unusable, refuse_unwritable
from tunefleet.launch.placement import run_config, scaling
from tunefleet.launch.runs import claimed, open_run
from tunefleet.launch.signals import StopWish, stop_wishes
from tunefleet.launch.waiting import Waiting
from tunefleet.models import check_weights
from tunefleet.plan import Plan
from tunefleet.recipe.sections import Recipe
from tunefleet.storage import Place, newest_complete, place, step_of
from tunefleet.worker.events import Event
from tunefleet.worker.failures import failures, last_failure
from tunefleet.worker.job import JobConfig
from tunefleet.worker.mailbox import collect, open_mailbox
from tunefleet.worker.run import run_worker

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
    with ExitStack() as stack:
        joins = cluster_address(recipe.ray) is not None
        if joins:
            stack.enter_context(ray_session(recipe.ray))
        cluster = joined_shape() if joins else local_shape(recipe.ray)
        storage = place(recipe.ray.ray_storage_path, base=root)
        refuse_unusable(storage, "ray_storage_path")
        with display.preparing() as stages:
            plan = draft(recipe, cluster, root, stages)
        check_weights(recipe.model)
        folder = RunFolder(storage.child(plan.place.run_name))
        output_dir = (root / Path(plan.place.output_dir).expanduser()).resolve()
        refuse_foreign_output(output_dir, folder, recipe.run.overwrite_output_dir)
        refuse_unwritable(output_dir, "output_dir")
        stack.enter_context(claimed(folder))
        notices = open_run(plan, folder)
        for text in (*plan.notices, *notices):
            display.note(text)
        stack.enter_context(display)
        if not joins:
            stack.enter_context(ray_session(recipe.ray))
        wish = stack.enter_context(stop_wishes())  # after Ray has started, which sets an answer to SIGTERM of its own
        try:
            summary = _fit(plan, storage, folder, display, wish)
        except KeyboardInterrupt as error:
            raise BrokenOff(f"Broken off: {_what_is_left(folder)}.") from error
        except RayError as error:  # as when a signal to the whole process group ends Ray's processes too
            raise RunFailed(f"Ray ended during the run, which was broken off: {_what_is_left(folder)}.") from error
        if not summary["stopped"]:
            bring_home(folder, output_dir, recipe.run.plot_loss)
        return Outcome(plan, folder.root, output_dir, summary, wish.exit_code if summary["stopped"] else 0)


def _fit(plan: Plan, storage: Place, folder: RunFolder, display: Display, wish: StopWish) -> dict[str, Any]:
    """Run the workers; show what they tell; pass a wish to stop on to them."""
    running = Running(plan, storage, folder, shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
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

    def __init__(self, plan: Plan, storage: Place, folder: RunFolder, command: str) -> None:
        """Start the workers of a run whose folder is claimed and open.

        Args:
            command: what repeats the run.
        """
        self._folder = folder
        self._mailbox = open_mailbox()
        config: JobConfig = {
            "plan": plan.model_dump_json(),
            "run": folder.root.uri,
            "mailbox": self._mailbox,
            "command": command,
        }
        function: Any = run_worker  # Ray's types know no function that returns something
        trainer = TorchTrainer(
            function,
            train_loop_config=dict(config),
            scaling_config=scaling(plan),
            run_config=run_config(plan, storage, self._mailbox),
            torch_config=TorchConfig(timeout_s=plan.recipe.ray.ddp_timeout),
        )
        self._waiting = Waiting(plan)
        self._fit = _Fit(trainer)
        self._fit.start()

    def goes_on(self, seconds: float = _POLL_SECONDS) -> bool:
        """Wait for the run's end, but not longer than `seconds`. Returns whether it still goes on.

        Raises:
            RunFailed: the cluster has had no room for the workers for too long.
        """
        self._fit.join(seconds)
        self._waiting.look()
        return self._fit.is_alive()

    def events(self) -> list[Event]:
        """What the workers have told since the last time, oldest first."""
        return self._waiting.heard(collect(self._mailbox))

    def stop(self) -> None:
        """Ask the workers to save a checkpoint at the next step and to end."""
        self._mailbox.stop.remote()

    def summary(self) -> dict[str, Any]:
        """What rank 0 returned; the line to the workers is closed.

        Raises:
            Refused: the workers found that the recipe cannot run.
            RunFailed: anything else went wrong.
        """
        ray.kill(self._mailbox)
        return self._fit.summary(self._folder)


def _what_is_left(folder: RunFolder) -> str:
    """What a run that was broken off goes on from."""
    newest, _ = newest_complete(folder.checkpoints)
    if newest is None:
        return "there is no checkpoint yet, so the same command begins anew"
    return f"the same command goes on from step {step_of(newest)}"


class _Fit(threading.Thread):
    """`TorchTrainer.fit` off the main thread, which must stay free for signals."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="fit")
        self._trainer = trainer
        self._result: Result | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            result: Any = self._trainer.fit()  # Ray declares the older of its two results
            self._result = result
        except Exception as error:  # handed over to the main thread, which raises it
            self._error = error

    def summary(self, folder: RunFolder) -> dict[str, Any]:
        """What rank 0 returned.

        Raises:
            Refused: the workers found that the recipe cannot run.
            RunFailed: anything else went wrong.
        """
        returned: Any = None if self._result is None else self._result.return_value
        if isinstance(returned, dict) and "failed" not in returned:
            return returned
        failure = last_failure(failures(folder.record))
        if failure is not None and failure.refused:
            raise Refused(failure.message)
        if isinstance(returned, dict) and returned.get("why"):
            raise RunFailed(str(returned["why"]))
        if failure is not None:
            raise RunFailed(f"The run failed at step {failure.step}: {failure.message}") from self._error
        raise RunFailed(f"The run failed before its first step: {self._error}") from self._error
