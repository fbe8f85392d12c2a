"""What Ray Tune asks for the next trial: points that can run, each once, when there is room for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from tunefleet.errors import Refused
from tunefleet.plan import Plan
from tunefleet.search.book import Book, Trial
from tunefleet.search.searchers import Pool, Suggestions, packed, unpacked
from tunefleet.search.sizing import Size, fit, size_of
from tunefleet.search.space import Point, Space
from tunefleet.shapes import ClusterShape
from tunefleet_strategies.errors import StrategyError

MOST_ASKED = 100
"""Proposals in a row that were illegal or equal to earlier ones, after which a search looks for new points itself."""
MOST_DRAWN = 1000
MOST_OVERTAKEN = 4
"""Trials that wait for room while smaller ones begin."""


def configuration(trial: Trial) -> dict[str, Any]:
    """What the driver of a trial is told: of a population also how far it may go, or that it has been there."""
    told: dict[str, Any] = {"trial": trial.name}
    if trial.until is not None:
        told |= {"until": trial.until, "rested": trial.report_at(trial.until)}
    return told


class PointSearcher(Searcher):
    """Hands trials to Ray Tune: first those that an earlier call left open, then new points."""

    def __init__(
        self,
        space: Space,
        pools: Sequence[Pool],
        book: Book,
        draft: Callable[[Point], Plan],
        place: Callable[[Trial, Plan], None],
        cluster: ClusterShape | None,
        *,
        repeats: Callable[[], Sequence[tuple[Trial, Point]]] | None = None,
        most_at_once: int | None,
        least: Size | None = None,
        seed: int,
        config: Callable[[Plan], dict[str, Any]] | None = None,
        until: int | None = None,
    ) -> None:
        """Begin, or go on from what the book says.

        Args:
            draft: makes the plan of a point; raises `Refused` or `StrategyError` where it cannot run.
            place: puts a trial's plan where its driver finds it.
            cluster: what trials must find room in; None = nobody knows how large it may become.
            repeats: what shall run again under another seed, with the trial that it repeats; asked when no point is
                left to sample, and once more whenever a trial has ended. None = nothing.
            most_at_once: trials at once; None = as many as the cluster holds.
            least: what the smallest trial takes; None = nothing overtakes a trial that has no room yet.
            config: what Tune is told of a trial beside its name; None = nothing.
            until: the step that the trials of a population train to at first.
        """
        super().__init__(metric=None, mode=None)
        self.closed = False
        """Set when no further trial shall start."""
        self.paused: frozenset[str] = frozenset()
        """Tune's identifiers of trials that hold no workers at the moment."""
        self.drained = False
        """Whether there was nothing more to hand out, not even for lack of room."""
        self.refused: dict[str, int] = {}
        """Why proposals were not run, with how many of them."""
        self._space, self._pools, self._book, self._cluster = space, pools, book, cluster
        self._draft, self._place, self._repeats = draft, place, repeats
        self._most, self._least, self._seed = most_at_once, least, seed
        self._config, self._until = config, until
        self._asked = 0
        self._dry: set[int] = set()
        """Branches that have no further points."""
        self._identifiers: dict[str, str] = {}
        self._told: set[str] = set()
        self._sizes: dict[str, Size] = {}
        self._names: dict[str, str] = {}
        self._restore()
        self._open = [trial for trial in book.trials if not trial.ended]
        self._waiting: list[tuple[Trial, Plan]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a search goes on from its own book, never from Ray's copy of this object."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept here; see `Book`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is kept here; see `Book`."""

    def suggest(self, trial_id: str) -> Any:
        """The next trial by its name; None = not now."""
        if self.closed:
            return Searcher.FINISHED
        found = self._with_room()
        self.drained = found is None and not self._waiting
        if found is None:
            return None if self._waiting or self._awaited() else Searcher.FINISHED
        trial, plan = found
        self._sizes[trial_id], self._names[trial_id] = size_of(plan.workers), trial.name
        return {**configuration(trial), **({} if self._config is None else self._config(plan))}

    def settled(self, branch: int) -> bool:
        """Whether every trial that a branch will ever have is there."""
        pool = next(pool for pool in self._pools if pool.holds(branch))
        return branch in self._dry or not self._wants(pool)

    def goes_on(self, trial_id: str, size: Size | None) -> bool:
        """Whether there is room for a paused trial, which has another size from now on if one is given."""
        self._sizes[trial_id] = size or self._sizes[trial_id]
        return self._has_room(self._sizes[trial_id])

    def running(self) -> dict[str, Size]:
        """What each trial takes that has been handed out and has not ended, by its name."""
        sizes = list(self._sizes.items())  # Tune goes on in its own thread
        return {self._names[trial_id]: size for trial_id, size in sizes if trial_id not in self.paused}

    def _with_room(self) -> tuple[Trial, Plan] | None:
        """The first of the trials that wait for room if there is some for it, else a new one that overtakes them.

        Few may be overtaken: then nothing new is chosen before they have had their turn.
        """
        for position, (_, plan) in enumerate(self._waiting):
            if self._has_room(size_of(plan.workers)):
                return self._waiting.pop(position)
        while not self._waiting or (len(self._waiting) < MOST_OVERTAKEN and self._has_some_room()):
            found = self._take_up() or self._choose() or self._repeat()
            if found is None or self._has_room(size_of(found[1].workers)):
                return found
            self._waiting.append(found)
        return None

    def _has_some_room(self) -> bool:
        return self._least is not None and self._has_room(self._least)

    def _awaited(self) -> bool:
        """Whether the end of those under way may call for repeats."""
        return self._repeats is not None and bool(self._sizes)

    def _has_room(self, size: Size) -> bool:
        taken = [one for trial_id, one in self._sizes.items() if trial_id not in self.paused]
        if self._most is not None and len(taken) >= self._most:
            return False
        return not taken or self._cluster is None or fit([*taken, size], self._cluster)

    def _take_up(self) -> tuple[Trial, Plan] | None:
        """A trial that an earlier call left open."""
        while self._open:
            trial = self._open.pop(0)
            try:
                plan = self._draft(trial.point())
            except (Refused, StrategyError) as error:
                trial.state, trial.error = "infeasible", str(error)
                self._book.save()
                self._tell(trial.name, None)
                continue
            self._place(trial, plan)
            return trial, plan
        return None

    def _choose(self) -> tuple[Trial, Plan] | None:
        """A new point that can run: of the pool that has had the fewest trials, if it has one."""
        for pool in sorted(filter(self._wants, self._pools), key=self._had):
            found = self._choose_from(pool)
            if found is not None:
                return found
            self._dry |= {branch.index for branch in pool.space.branches}
        return None

    def _had(self, pool: Pool) -> int:
        return sum(pool.holds(trial.branch) for trial in self._book.sampled)

    def _wants(self, pool: Pool) -> bool:
        return pool.samples is None or self._had(pool) < pool.samples

    def _choose_from(self, pool: Pool) -> tuple[Trial, Plan] | None:
        for _ in range(MOST_ASKED):
            self._asked += 1
            identifier = f"asked_{self._asked}"
            proposed = pool.searcher.ask(identifier)
            if proposed is None:
                self._keep()
                return None
            try:
                point = self._space.point(proposed.branch, proposed.values)
            except Refused as error:
                self._refuse(error)
                pool.searcher.tell(identifier, None)
                continue
            found = self._begin(point, pool, identifier)
            if found is not None:
                return found
        return self._look_around(pool)

    def _begin(self, point: Point, pool: Pool, identifier: str | None) -> tuple[Trial, Plan] | None:
        """The trial of a point, if it is new and can run."""
        twin = self._book.twin(point)
        plan = self._planned(point) if twin is None else None
        if plan is None:
            if identifier is not None:
                known = twin is not None and twin.ended and twin.reports and twin.error is None
                pool.searcher.tell(identifier, dict(twin.reports[-1]) if twin is not None and known else None)
            return None
        trial = self._added(point, plan)
        if identifier is not None:
            self._identifiers[trial.name] = identifier
        self._put(trial, plan)
        return trial, plan

    def _planned(self, point: Point) -> Plan | None:
        try:
            return self._draft(point)
        except (Refused, StrategyError) as error:
            self._refuse(error)
            return None

    def _added(self, point: Point, plan: Plan, repeats: int | None = None) -> Trial:
        branch = self._space.branches[point.branch]
        count, updates = plan.workers.count, plan.batch.updates
        trial = self._book.add(point, branch.name, branch.method.name, count, updates, repeats)
        trial.until = self._until
        return trial

    def _put(self, trial: Trial, plan: Plan) -> None:
        self._place(trial, plan)
        self._keep()
        self._book.save()

    def _look_around(self, pool: Pool) -> tuple[Trial, Plan] | None:
        """A new point at random, where the searcher finds none any more."""
        chance = random.Random(f"{self._seed}-{len(self._book.trials)}")
        for _ in range(MOST_DRAWN):
            branch, values = pool.space.draw(chance)
            try:
                point = self._space.point(branch, values)
            except Refused:
                continue
            found = self._begin(point, pool, None) if self._book.twin(point) is None else None
            if found is not None:
                return found
        return None

    def _repeat(self) -> tuple[Trial, Plan] | None:
        """The next repeat that can run."""
        for repeated, point in self._repeats() if self._repeats is not None else ():
            plan = self._planned(point)
            if plan is not None:
                trial = self._added(point, plan, repeated.number)
                self._put(trial, plan)
                return trial, plan
        return None

    def _refuse(self, error: Exception) -> None:
        self.refused[str(error)] = self.refused.get(str(error), 0) + 1

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Figures of a trial that goes on."""
        name = self._names.get(trial_id, "")
        identifier = self._identifiers.get(name)
        if identifier is not None:
            self._searcher(name).hear(identifier, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended, or was interrupted to be gone on with by the same command."""
        self._sizes.pop(trial_id, None)
        name = self._names[trial_id]
        how = None if result is None else result.get("ended")
        if how == "interrupted":
            return
        self._tell(name, result if not error and how in (None, "finished") else None)

    def on_pause(self, trial_id: str) -> None:
        """What HyperBand for BOHB tells its searcher."""
        name = self._names[trial_id]
        identifier = self._identifiers.get(name)
        if identifier is not None:
            self._searcher(name).pause(identifier, True)

    def on_unpause(self, trial_id: str) -> None:
        """What HyperBand for BOHB tells its searcher."""
        name = self._names[trial_id]
        identifier = self._identifiers.get(name)
        if identifier is not None:
            self._searcher(name).pause(identifier, False)

    def _tell(self, name: str, result: dict[str, Any] | None) -> None:
        identifier = self._identifiers.get(name)
        if identifier is not None and name not in self._told:
            self._searcher(name).tell(identifier, result)
        self._told.add(name)
        self._keep()

    def _searcher(self, name: str) -> Suggestions:
        """The searcher that chose a trial."""
        branch = self._book.named(name).branch
        return next(pool.searcher for pool in self._pools if pool.holds(branch))

    def _keep(self) -> None:
        states = [pool.searcher.state() for pool in self._pools]
        state = packed(searchers=states, asked=self._asked, identifiers=self._identifiers, told=sorted(self._told))
        self._book.keep_searcher_state(state)

    def _restore(self) -> None:
        """What the searcher had learned; what it has not heard of, it is told now."""
        state = self._book.searcher_state()
        if state is None:
            return
        kept = unpacked(state)
        for pool, learned in zip(self._pools, kept["searchers"], strict=True):
            pool.searcher.restore(learned)
        self._asked, self._identifiers, self._told = kept["asked"], kept["identifiers"], set(kept["told"])
        for trial in self._book.trials:
            if trial.ended and trial.name not in self._told:
                heard = trial.state in ("finished", "stopped") and trial.reports
                self._tell(trial.name, dict(trial.reports[-1]) if heard else None)
