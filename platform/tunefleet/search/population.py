"""Population based training without Ray: who takes over whose state, and with which values it goes on.

(Jaderberg et al., arXiv 1711.09846.) Each branch has a population of its own, so a state never changes its method.
Every `perturbation_interval` steps all of a population are compared at the same step: the worst ones go on from the
states of the best with values changed a little. So what a search finds depends on its recipe and seeds alone, not on
which trial was faster, and killing its driver does not change it: until a turn is in the book, it is made again alike.

What goes on:
- the data at the donor's step, which is the heir's too: the same global batches in the same order for all;
- the learning-rate schedule at that step, under the new peak;
- random states (dropout) as they are in the donor's checkpoint; all trials have the recipe's seed;
- the method's state, as `tunefleet_strategies.carry` says.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from tunefleet.artifacts.folder import RunFolder
from tunefleet.checkpoints import step_name
from tunefleet.errors import Refused
from tunefleet.launch.runs import claimed, hand_down
from tunefleet.plan import Plan
from tunefleet.recipe.tune import TuneSettings
from tunefleet.search import domains
from tunefleet.search.book import RUNS, Book, Trial
from tunefleet.search.driven import plan_place
from tunefleet.search.schedulers import Clock
from tunefleet.search.space import Branch, Point
from tunefleet.search.trials import BranchPlan, Workshop
from tunefleet.training.checkpoint import convert
from tunefleet_strategies.carry import SHARED, carry, mutable_keys
from tunefleet_strategies.contract import Choice, Domain, QUniform, RandInt
from tunefleet_strategies.errors import StrategyError

RESAMPLED = 0.25
"""How likely a value is drawn anew instead of changed a little, as in Ray Tune."""
FACTORS = (0.8, 1.2)
_MOST_TRIED = 20
"""Changes that are tried for one that can run."""


def turn_steps(tune: TuneSettings, time: Clock) -> int:
    """Steps from one comparison to the next: as written, else about a quarter of a trial."""
    return tune.perturbation_interval or time.interval * max(1, round(time.updates / 4 / time.interval))


def first_turn(tune: TuneSettings, time: Clock) -> int | None:
    """The step of the first comparison; None where trials are too short for one."""
    steps = turn_steps(tune, time)
    return steps if steps < time.updates else None


def refuse_population(tune: TuneSettings, time: Clock, plans: Sequence[BranchPlan]) -> None:
    """Refuse what no state can be handed on of, and comparisons at steps without the metric.

    Raises:
        Refused: so it is.
    """
    steps = turn_steps(tune, time)
    if steps % time.interval:
        fitting = math.ceil(steps / time.interval) * time.interval
        raise Refused(
            f"tune.perturbation_interval: {steps} is no whole number of intervals of {time.interval} steps, after "
            f"which trials report {tune.metrics[0]}: write {fitting}."
        )
    for one in plans:
        if one.plan.sharding is not None:
            raise Refused(
                f"scheduler: pbt hands on states that every worker holds whole, but {one.branch.name} shares its state "
                f"out (sharding: {one.plan.sharding}): write sharding: none and no deepspeed, or scheduler: asha."
            )
        if not one.plan.resumable:
            raise Refused(
                f"scheduler: pbt goes on from checkpoints, and {one.branch.name} keeps none that hold everything: "
                f"write save_only_model: false and optimizer_backend: native, or scheduler: asha."
            )


def kept_as_they_are(plans: Sequence[BranchPlan]) -> list[str]:
    """A notice for each searched key that trials inherit unchanged although their method could change it."""
    return [
        f"pbt changes no {key} of {one.branch.name}: {reason}"
        for one in plans
        for key, reason in one.plan.recipe.method.mutable().items()
        if reason is not None and key in one.branch.domains
    ]


def heirs(members: Sequence[Trial], step: int, tune: TuneSettings, chance: random.Random) -> list[tuple[Trial, Trial]]:
    """Who takes over whose state: each of the worst part, with one of as many of the best that did better.

    What has no finite figure is worse than everything.
    """
    metric, sign = tune.metrics[0], 1.0 if tune.modes[0] == "min" else -1.0

    def score(trial: Trial) -> float:
        value = (trial.report_at(step) or {}).get(metric)
        return math.inf if value is None or not math.isfinite(value) else sign * value

    ranked = sorted(members, key=lambda trial: (score(trial), trial.number))
    count = min(math.ceil(len(ranked) * tune.quantile_fraction), len(ranked) // 2)
    pairs = [(heir, chance.choice(ranked[:count])) for heir in ranked[len(ranked) - count :]]
    return [(heir, donor) for heir, donor in pairs if score(donor) < score(heir)]


def perturbed(
    values: Mapping[str, JsonValue], searched: Mapping[str, Domain], keys: frozenset[str], chance: random.Random
) -> dict[str, object]:
    """A donor's values with some of the searched ones changed a little, or drawn anew; inside their domains."""
    return {
        key: _moved(value, searched[key], chance) if key in keys and key in searched else value
        for key, value in values.items()
    }


def _moved(value: JsonValue, domain: Domain, chance: random.Random) -> object:
    resampled, factor = chance.random() < RESAMPLED, chance.choice(FACTORS)
    number = float(value) if isinstance(value, int | float) else 0.0
    if resampled or (number == 0 and not isinstance(domain, Choice)):
        return domains.draw(domain, chance)
    if isinstance(domain, Choice):
        place = domain.values.index(value) + (1 if factor > 1 else -1)
        return domain.values[min(max(place, 0), len(domain.values) - 1)]
    if isinstance(domain, RandInt):
        moved = round(number * factor)
        moved += (1 if factor > 1 else -1) if moved == number else 0
        return min(max(moved, domain.low), domain.high - 1)
    if isinstance(domain, QUniform):
        places = round((number * factor - domain.low) / domain.step)
        return domains.rounded(domain.low + places * domain.step, domain)
    return domains.rounded(number * factor, domain)


def inherit(donor: RunFolder, heir: RunFolder, step: int, before: Plan, now: Plan, seed: int, came: JsonValue) -> None:
    """Let a run go on from where another one stands: its checkpoint, carried to the new values, and its record.

    Whatever interrupts this, it can be made again: the donor is only read, and the heir's own state is not needed.

    Args:
        before: the donor's plan.
        now: the heir's, from now on.
        seed: what new directions are drawn by.
        came: what the heir's lineage says of it.

    Raises:
        StrategyError: the state does not allow a change; nothing is changed then.
        Refused: a value differs that may not change.
    """
    may_change, training = mutable_keys(before.recipe.method), now.recipe.training
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as name, claimed(heir):
        folder = Path(name)
        donor.checkpoints.child(step_name(step)).download(folder)
        old, new = before.recipe.method, now.recipe.method
        convert(folder, lambda saved: carry(saved, old, new, training.weight_decay, seed))
        hand_down(donor, heir, now, may_change, came)
        heir.checkpoints.child(step_name(step)).upload(folder)
        for other in heir.checkpoints.children():
            if other.name != step_name(step):
                other.delete()


@dataclass(frozen=True)
class Population:
    """Makes the turns of a search's populations."""

    shop: Workshop
    book: Book
    time: Clock
    seed: int
    note: Callable[[str], None]
    """Tells the person something."""

    def turn(self, members: Sequence[Trial]) -> dict[str, Plan]:
        """Compare trials of one branch that have all come to the same step, and let them go on.

        Returns the new plans of those that have taken another one's state over, by name.

        Files are changed first and the book after them, at once for all: whoever is killed before makes the same turn
        again, because it follows from the book and from states that the turn does not change.
        """
        step = members[0].until
        assert step is not None
        chance = random.Random(f"{self.seed}-pbt-{members[0].branch}-{step}")
        pairs = heirs(sorted(members, key=lambda trial: trial.number), step, self.shop.tune, chance)
        came = [(heir, donor, *self._take_over(heir, donor, step, chance)) for heir, donor in pairs]
        for heir, donor, point, plan in came:
            values: dict[str, JsonValue] = dict(point.values)
            heir.exploits.append({"step": step, "donor": donor.number, "before": heir.values, "values": values})
            heir.values, heir.digest, heir.workers = values, point.digest, plan.workers.count
        following = step + turn_steps(self.shop.tune, self.time)
        for trial in members:
            trial.until = following if following < self.time.updates else None
        self.book.save()
        for heir, donor, _, plan in came:
            self.shop.put(heir, plan)
            self.note(f"step {step}: trial {heir.number} goes on from trial {donor.number} with {_told(heir, donor)}")
        return {heir.name: plan for heir, _, _, plan in came}

    def _take_over(self, heir: Trial, donor: Trial, step: int, chance: random.Random) -> tuple[Point, Plan]:
        """Move the donor's state over, with as much changed as can be."""
        branch = self.shop.space.branches[donor.branch]
        before = Plan.model_validate_json(plan_place(self.shop.search, donor.name).read_text())
        may_change = mutable_keys(before.recipe.method)
        runs = self.shop.search.child(RUNS)
        folders = RunFolder(runs.child(donor.name)), RunFolder(runs.child(heir.name))
        for keys in (may_change, may_change & SHARED, frozenset[str]()):
            point, plan = self._changed(branch, donor, keys, chance) or (donor.point(), self.shop.plan(donor.point()))
            told = {"step": step, "from": donor.name, "before": dict(donor.values), "values": dict(point.values)}
            try:
                inherit(*folders, step, before, plan, chance.getrandbits(31), json.loads(json.dumps(told)))
            except StrategyError as error:
                self.note(f"trial {heir.number}: {error}")
            else:
                return point, plan
        raise AssertionError("a state can always be handed on under its own values")

    def _changed(
        self, branch: Branch, donor: Trial, keys: frozenset[str], chance: random.Random
    ) -> tuple[Point, Plan] | None:
        """A point near the donor's that can run; None where none is found."""
        for _ in range(_MOST_TRIED):
            try:
                point = branch.point(perturbed(donor.values, branch.domains, keys, chance))
                if point.digest != donor.digest:
                    return point, self.shop.plan(point)
            except (Refused, StrategyError):
                continue
        return None


def _told(heir: Trial, donor: Trial) -> str:
    changed = [
        f"{key} {domains.word(donor.values.get(key))} -> {domains.word(value)}"
        for key, value in heir.values.items()
        if donor.values.get(key) != value
    ]
    return ", ".join(changed) or "its values"
