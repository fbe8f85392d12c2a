"""A search from the driver's side: check its space, run its trials under Ray Tune, bring the best one home."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from pydantic import JsonValue
from ray import cloudpickle
from ray import tune as ray_tune
from ray.exceptions import RayError, RayTaskError
from ray.tune import TuneError
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler

from tunefleet.artifacts.claim import mark_of
from tunefleet.artifacts.folder import RunFolder
from tunefleet.errors import LONGEST_REASON, BrokenOff, Refused, RunFailed, first_line
from tunefleet.launch.cluster import cluster_address, joined_shape, local_shape, search_session
from tunefleet.launch.home import refuse_output, refuse_unusable
from tunefleet.launch.job_folder import goes_with_the_job
from tunefleet.launch.runs import claimed
from tunefleet.launch.signals import StopWish, stop_wishes
from tunefleet.models import check_weights
from tunefleet.recipe.sections import RaySettings, Recipe, RunSettings
from tunefleet.recipe.tune import SearchRecipe, TuneSettings
from tunefleet.search.board import Progress, open_board
from tunefleet.search.book import BOOK, PLANS, RUNS, SEARCHER, Book, State
from tunefleet.search.breadth import Breadth, all_may_wait, breadth, seats_for_drivers
from tunefleet.search.driven import ENDED, ERROR, FIGURES, sentence
from tunefleet.search.ending import leave
from tunefleet.search.hosts import forks_here, host_keys, hosts_of
from tunefleet.search.live import SearchDisplay
from tunefleet.search.opening import open_space
from tunefleet.search.packing import Packer
from tunefleet.search.points import PointSearcher
from tunefleet.search.population import Population, first_turn, kept_as_they_are, refuse_population
from tunefleet.search.result import RESULT_FOLDER, bring_search_home
from tunefleet.search.rounds import Rounds
from tunefleet.search.schedulers import Clock, clock, pauses, remember, scheduler
from tunefleet.search.searchers import pools, refuse_missing
from tunefleet.search.space import WISH
from tunefleet.search.telemetry import callbacks_uncounted
from tunefleet.search.tournament import planned_trials, repeats_due, samples
from tunefleet.search.trial import RunTrial
from tunefleet.search.trials import BranchPlan, Workshop, smallest
from tunefleet.search.warm.forks import ForkServer, fork_server
from tunefleet.search.warm.host import Hosts, HostTrial, place_of
from tunefleet.shapes import TRIAL_DRIVER
from tunefleet.storage import Place, place
from tunefleet.worker.failures import failures, last_failure

HEAD_NODE = "node:__internal_head__"
HEAD_SHARE = 0.001
_POLL_SECONDS = 0.5
_RAY_FILES = "ray"
_SWITCHES = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that cannot run reports none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the book is kept by us
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # a search goes on from its book
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class SearchOutcome:
    """How a search ended."""

    book: Book
    tune: TuneSettings
    search: Place
    output_dir: Path
    exit_code: int
    """0 finished, 130 or 143 stopped by a signal."""


def tune(search: SearchRecipe, display: SearchDisplay, root: Path, server: ForkServer | None = None) -> SearchOutcome:
    """Run a search to its end, or until a signal stops it; go on with one that was interrupted.

    Args:
        root: the folder that relative paths of the recipe start from.
        server: what warm trials on this machine are forks of; None = one is started where the search has a use for it.

    Raises:
        Refused: the search cannot run; nothing was started.
        RunFailed: no trial went to its end, or Ray ended.
        BrokenOff: a second signal came.
    """
    space = open_space(search)
    refuse_missing(search.tune.search)
    common = space.common_recipe()
    folder = place(common.ray.ray_storage_path, base=root).child(common.run_name)
    output_dir = (root / Path(common.run.output_dir).expanduser()).resolve()
    with ExitStack() as stack:
        joins = cluster_address(common.ray) is not None
        if joins:
            stack.enter_context(search_session(common.ray))
        cluster = joined_shape(common.ray) if joins else local_shape(common.ray)
        shop = Workshop(space, search.tune, search.keys, cluster, root, folder)
        warm = search.tune.trial_host == "warm"
        forks = warm and forks_here(common.ray, joins)
        if forks and server is None:
            server = stack.enter_context(fork_server())
        with display.preparing() as stages:
            plans = shop.survey(stages)
        first = plans[0].plan
        timed = clock(search.tune, first.batch.updates, first.cadence)
        if search.tune.scheduler == "pbt":
            refuse_population(search.tune, timed, plans)
        hosts = hosts_of(plans, server if forks else None) if warm else None
        check_weights(common.model)
        refuse_unusable(place(common.ray.ray_storage_path, base=root), "ray_storage_path")
        stays = not goes_with_the_job(output_dir)
        if stays:
            refuse_output(output_dir, RunFolder(folder), common.run.overwrite_output_dir)
        stack.enter_context(claimed(RunFolder(folder)))
        book = _open_book(search, common, folder, len(space.branches))
        trials = planned_trials(space, search.tune)
        seats = seats_for_drivers() if joins and not warm else None
        wide = breadth(search.tune, smallest(plans), cluster, trials, seats)
        of_pbt = kept_as_they_are(plans) if search.tune.scheduler == "pbt" else ()
        for text in (*space.notices, *of_pbt, *plans[0].plan.notices, *filter(None, [wide.notice])):
            display.note(text)
        display.show_plan(plans, book, trials, wide.most)
        if not joins:
            stack.enter_context(search_session(common.ray))
        wish = stack.enter_context(stop_wishes())
        stack.enter_context(display)
        with _told_of_ray():
            ending = _Search(shop, plans, book, common, display, wish, hosts, wide, timed).run()
    if ending:
        return SearchOutcome(book, search.tune, folder, output_dir, ending)
    leave(shop, book)
    if stays:
        bring_search_home(folder, output_dir, plot=common.run.plot_loss)
    return SearchOutcome(book, search.tune, folder, output_dir, 0)


@contextmanager
def _told_of_ray() -> Iterator[None]:
    """Turn what Ray raises during a search into our own sentences."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise BrokenOff("Broken off: the same command goes on from the trials' newest checkpoints.") from error
    except RayError as error:
        raise RunFailed("Ray ended during the search: the same command goes on from what it left.") from error
    except TuneError as error:
        raise RunFailed(f"Ray Tune broke off ({error}): the same command goes on from what it left.") from error


def _open_book(search: SearchRecipe, common: Recipe, folder: Place, branches: int) -> Book:
    """The book of this search, begun or gone on with.

    Raises:
        Refused: it is finished, or another search has this name.
    """
    run = common.run
    if isinstance(run.resume_from_checkpoint, str):
        raise Refused(
            "resume_from_checkpoint names a checkpoint, and the trials of a search begin at the base model: leave the "
            "key out; the same command goes on with a search."
        )
    if run.resume_from_checkpoint is False:
        _clear(folder)
    if RunFolder(folder).record.exists():
        raise Refused(f"{folder.uri} is a run and no search: choose another ray_run_name or output_dir for the search.")
    book = Book(folder)
    wanted = _identity(search)
    more = _more(search.tune, branches, common.training.seed, book)
    if book.complete and run.overwrite_output_dir and book.searched == wanted and not more:
        _clear(folder)
        book = Book(folder)
    if book.searched and book.searched != wanted:
        changed = sorted(key for key in {*book.searched, *wanted} if book.searched.get(key) != wanted.get(key))
        raise Refused(
            f"The search {folder.name} was begun with other values ({', '.join(changed)}): restore them to go on, "
            f"write resume_from_checkpoint: false to begin anew, or choose another ray_run_name."
        )
    if book.complete and not more:
        raise Refused(
            f"The search {folder.name} is finished ({folder.uri}): write a larger tune.num_samples to go on, "
            f"overwrite_output_dir: true to search anew, or choose another output_dir or ray_run_name."
        )
    book.complete, book.searched = False, wanted
    for trial in book.open_trials:
        trial.state = "waiting"
    book.save()
    return book


def _more(settings: TuneSettings, branches: int, seed: int, book: Book) -> bool:
    """Whether a finished search is asked for more trials than it has had."""
    most = samples(settings, branches)
    return (most is not None and most > len(book.sampled)) or bool(repeats_due(book, settings, seed))


_MAY_CHANGE = frozenset(
    {"num_samples", "max_concurrent_trials", "budget", "trial_retries", "finalist_seeds", "trial_host"}
)


def _identity(search: SearchRecipe) -> dict[str, JsonValue]:
    """What makes a search this one: another value would make other trials."""
    free = (set(RunSettings.model_fields) | set(RaySettings.model_fields)) - {WISH, "eval_strategy", "eval_steps"}
    keys = {key: value for key, value in search.keys.items() if key not in free and value is not None}
    block = {
        f"tune.{key}": value for key, value in search.tune.model_dump(mode="json").items() if key not in _MAY_CHANGE
    }
    kept: dict[str, JsonValue] = json.loads(json.dumps({**keys, **block}, default=str))
    return kept


def _clear(folder: Place) -> None:
    for name in (RUNS, PLANS, RESULT_FOLDER, _RAY_FILES, BOOK, SEARCHER):
        folder.child(name).delete()


class _Search:
    """A search under way."""

    def __init__(
        self,
        shop: Workshop,
        plans: list[BranchPlan],
        book: Book,
        common: Recipe,
        display: SearchDisplay,
        wish: StopWish,
        hosts: Hosts | None,
        wide: Breadth,
        timed: Clock,
    ) -> None:
        """
        Args:
            hosts: what hosts of warm trials start with; None where all are cold.
            wide: how many trials run at once.
            timed: how trials are timed.
        """
        self._shop, self._book, self._display, self._wish = shop, book, display, wish
        settings = shop.tune
        self._hosts = hosts
        seed = common.training.seed if settings.search_seed is None else settings.search_seed
        self._clock = timed
        self._notes: list[str] = []
        """What the thread of the trials has to say."""
        self._searcher = PointSearcher(
            shop.space,
            pools(shop.space, settings, samples(settings, len(shop.space.branches)), seed),
            book,
            shop.plan,
            shop.put,
            wide.cluster,
            repeats=(lambda: repeats_due(book, settings, common.training.seed)) if settings.tournament else None,
            most_at_once=wide.limit,
            least=smallest(plans),
            seed=seed,
            config=None if self._hosts is None else host_keys,
            until=first_turn(settings, self._clock) if settings.scheduler == "pbt" else None,
        )
        self._population = Population(shop, book, self._clock, seed, self._notes.append)
        self._board = open_board()
        self._scribe = Scribe(book, self._searcher, shop.search, self._clock)
        self._most = max(1, wide.most)
        ends_alone = hosts is None and settings.scheduler not in ("hyperband", "pbt")
        self._packer = Packer(shop.cluster) if shop.cluster.node_types and ends_alone else None
        self._error: BaseException | None = None

    def run(self) -> int:
        """Run the trials. Returns the exit code of a signal, or 0."""
        thread = threading.Thread(target=self._fit, daemon=True, name="search")
        thread.start()
        stopping = False
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            progress = ray.get(self._board.look.remote())
            self._display.update(self._book, progress)
            while self._notes:
                self._display.note(self._notes.pop(0))
            if not stopping:
                self._pack(progress)
            over = self._shop.tune.seconds is not None and self._book.elapsed() > self._shop.tune.seconds
            if (over or self._wish.signal is not None) and not stopping:
                stopping = True
                self._scribe.cuts = over
                self._searcher.closed = True
                self._board.stop.remote()
                self._display.note(
                    "the budget is spent: running trials end"
                    if over
                    else "stopping: the trials save checkpoints at their next step (once more to break off at once)"
                )
        for reason, count in self._searcher.refused.items():
            self._display.note(f"{count} proposed point(s) cannot run: {reason}")
        if self._error is not None:
            raise self._error
        self._shop.search.child(_RAY_FILES).delete()
        self._book.complete = self._wish.signal is None
        self._book.save()
        return self._wish.exit_code

    def _pack(self, progress: Mapping[str, Progress]) -> None:
        """Let the last trials share nodes, where nodes that are not needed go away.

        Warm ones stay with their host, and those that a scheduler pauses move at every turn anyway.
        """
        if self._packer is None or not self._searcher.drained:
            return
        for name, nodes in self._packer.look(self._searcher.running(), progress).items():
            self._board.leave.remote(name, nodes)
            number = self._book.named(name).number
            self._display.note(f"trial {number} moves to a node that others are on, so that its own can go")

    def _fit(self) -> None:
        try:
            with all_may_wait(self._most), callbacks_uncounted():
                self._tuner().fit()
        except BaseException as error:  # handed over to the main thread, which raises it
            self._error = error

    def _tuner(self) -> ray_tune.Tuner:
        for name, value in _SWITCHES.items():
            os.environ.setdefault(name, value)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        settings, search = self._shop.tune, self._shop.search
        made: TrialScheduler = (
            Rounds(self._population, self._searcher, self._book)
            if settings.scheduler == "pbt"
            else scheduler(settings, self._clock, self._book)
        )
        remember(made, settings, (trial for trial in self._book.trials if trial.ended))
        search.child(_RAY_FILES).delete()
        return ray_tune.Tuner(
            self._trainable(),
            tune_config=ray_tune.TuneConfig(
                search_alg=self._searcher,
                scheduler=made,
                num_samples=-1,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
                reuse_actors=self._hosts is not None,
            ),
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=search.child(_RAY_FILES).path,
                storage_filesystem=search.filesystem,
                callbacks=[self._scribe],
                failure_config=ray_tune.FailureConfig(max_failures=settings.trial_retries),
                verbose=0,
            ),
        )

    def _trainable(self) -> Any:  # a class that Ray makes of ours
        """What is started for each trial, and where."""
        settings = self._shop.tune
        seat = driver_seat(settings, self._most)
        shared: dict[str, Any] = {
            "search": self._shop.search.uri,
            "board": self._board,
            "evaluates": settings.metrics[0].startswith("eval_"),
            "interval": self._clock.interval,
        }
        if self._hosts is None:
            return ray_tune.with_resources(ray_tune.with_parameters(RunTrial, **shared), seat)
        host = ray_tune.with_parameters(HostTrial, **shared, hosts=self._hosts)
        return ray_tune.with_resources(host, partial(place_of, driver=seat))


def _name(trial: RayTrial) -> str:
    name: str = trial.config["trial"]
    return name


def _last_error(trial: RayTrial) -> str:
    """What Ray Tune caught last of a trial: an error of ours in its own words, else how Ray's begins.

    `RayTrial.get_pickled_error` looks in the storage, where the file is not yet.
    """
    error: Exception = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    caught = error.cause if isinstance(error, RayTaskError) else error
    return f"{first_line(caught, LONGEST_REASON)}."


def driver_seat(settings: TuneSettings, most: int) -> PlacementGroupFactory:
    """What the driver of a trial takes: never a CPU, or drivers would hold those that their workers wait for.

    Where trials are paused Ray itself chooses who goes on, so there the seats are as many as trials may be under way.
    """
    offered = ray.cluster_resources().get(TRIAL_DRIVER, 0.0)
    name, amount, whole = (TRIAL_DRIVER, 1.0, offered) if offered >= 1 else (HEAD_NODE, HEAD_SHARE, 0.9)
    if pauses(settings):
        amount = max(amount, int(whole / most)) if whole > 1 else max(amount, round(whole / most, 3))
    return PlacementGroupFactory([{"CPU": 0.0, name: amount}])


class Scribe(ray_tune.Callback):
    """Writes what Ray Tune's trials do into the book."""

    def __init__(self, book: Book, searcher: PointSearcher, search: Place, time_of: Clock) -> None:
        self.cuts = False
        """Whether trials that are interrupted now have had their share: the budget is spent."""
        self._book, self._searcher, self._search, self._clock = book, searcher, search, time_of
        self._since: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray's copy of this object is never used."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        """Let the searcher know who holds no workers."""
        paused = [trial for trial in trials if trial.status == RayTrial.PAUSED]
        self._searcher.paused = frozenset(trial.trial_id for trial in paused)
        for trial in paused:
            if self._book.named(_name(trial)).state == "running":
                self._note(trial, "paused")

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """A trial begins, or goes on."""
        self._since[trial.trial_id] = time.monotonic()
        self._note(trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports. HyperBand's own time is added, and the figures are kept."""
        kept = self._book.named(_name(trial))
        figures = {key: value for key, value in result.items() if key in FIGURES}
        # What is told again after a restart is known already; and a state that was taken over changes nothing of it.
        if result.get(ENDED) in (None, "finished") and kept.report_at(int(figures["step"])) is None:
            kept.reports.append(figures)
        kept.steps = max(kept.steps, int(result.get("step") or 0))
        self._note(trial, kept.state)

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """A trial has ended by itself, or was stopped by the scheduler."""
        last: Mapping[str, Any] = trial.last_result or {}
        how = last.get(ENDED)
        if how == "interrupted":
            self._note(trial, "cut" if self.cuts else "waiting")
            return
        state: State = how if how in ("finished", "failed", "infeasible") else "stopped"
        self._note(trial, state, last.get(ERROR))

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        """A trial has failed as often as it may."""
        folder = RunFolder(self._search.child(RUNS, _name(trial)))
        failure = last_failure(failures(folder.record, mark_of(folder.claim)))
        self._note(trial, "failed", sentence(failure) if failure is not None else _last_error(trial))

    def _note(self, trial: RayTrial, state: State, error: str | None = None) -> None:
        kept = self._book.named(_name(trial))
        now = time.monotonic()
        kept.seconds += now - self._since.get(trial.trial_id, now)
        self._since[trial.trial_id] = now
        kept.state, kept.error = state, error
        self._book.save()
