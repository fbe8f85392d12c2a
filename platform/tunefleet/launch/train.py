"""One training run from the driver's side: plan it, claim its folder, run it under Ray Train, bring the result home."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.trackers.tracker import refuse_missing
from tunefleet.checkpoints import newest_complete, step_of
from tunefleet.errors import BrokenOff, RunFailed
from tunefleet.launch.cluster import cluster_address, joined_shape, local_shape, ray_session
from tunefleet.launch.display import Display
from tunefleet.launch.draft import draft
from tunefleet.launch.home import bring_home, refuse_output, refuse_unusable
from tunefleet.launch.job_folder import goes_with_the_job
from tunefleet.launch.running import Running
from tunefleet.launch.runs import claimed, open_run
from tunefleet.launch.signals import StopWish, stop_wishes
from tunefleet.models import check_weights
from tunefleet.plan import Plan
from tunefleet.recipe.sections import Recipe
from tunefleet.storage import Place, place


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
        stays = not goes_with_the_job(output_dir)
        if stays:
            refuse_output(output_dir, folder, recipe.run.overwrite_output_dir)
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
        if stays and not summary["stopped"]:
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


def _what_is_left(folder: RunFolder) -> str:
    """What a run that was broken off goes on from."""
    newest, _ = newest_complete(folder.checkpoints)
    if newest is None:
        return "there is no checkpoint yet, so the same command begins anew"
    return f"the same command goes on from step {step_of(newest)}"
