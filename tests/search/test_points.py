"""What Ray Tune is handed: legal points, each once, when there is room; and all of it again after a kill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from tests.search.illegal import BASE
from tests.search.test_opening import opened

from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.plan import Plan
from tunefleet.planning import make_plan
from tunefleet.recipe.tune import search_from
from tunefleet.search.book import Book, Trial
from tunefleet.search.points import MOST_OVERTAKEN, PointSearcher
from tunefleet.search.searchers import pools
from tunefleet.search.sizing import Size, trial_keys, trial_recipe
from tunefleet.search.space import Point
from tunefleet.search.tournament import repeats_due, samples
from tunefleet.shapes import ClusterShape, NodeShape
from tunefleet.storage import place
from tunefleet_strategies.contract import ModelShape, ParameterShape

SHAPE = ModelShape("TinyForCausalLM", 10, 4, 1, (ParameterShape("embed", (10, 4), True),))
FOUR = ClusterShape((NodeShape(cpus=4),), cpu=Hardware("cpu", bf16=False))
RANKS: list[dict[str, Any]] = [{"finetuning_type": "lora", "lora_rank": {"choice": [2, 4, 8, 16]}}]
MIXED: list[dict[str, Any]] = [
    {"finetuning_type": "lora", "lora_rank": {"randint": [1, 500]}},
    {"finetuning_type": "full", "ray_num_workers": 1, "learning_rate": {"uniform": [1e-5, 1e-3]}},
]


class Desk:
    """A search without Ray: trials are handed out, and end when the test says so."""

    def __init__(
        self,
        folder: Path,
        space: Sequence[Mapping[str, Any]],
        *,
        at_once: int | None = None,
        least: Size | None = None,
        **tune: Any,
    ):
        shared = {**BASE, "resources_per_worker": {"CPU": 1}}
        search = search_from({**shared, "tune": {"space": list(space), **tune}})
        self.space = opened(list(space), tune, resources_per_worker={"CPU": 1})
        self.book = Book(place(folder))
        self.forbidden: set[int] = set()
        self.placed: list[str] = []

        def draft(point: Point) -> Plan:
            if point.values.get("lora_rank") in self.forbidden:
                raise Refused(f"rank {point.values['lora_rank']} does not fit")
            keys = trial_keys(self.space.branches[point.branch], point.values, shared)
            return make_plan(trial_recipe(keys, "trial", str(folder)), SHAPE, None, FOUR, str(folder))

        def put(trial: Trial, plan: Plan) -> None:
            self.placed.append(trial.name)

        self.searcher = PointSearcher(
            self.space,
            pools(self.space, search.tune, samples(search.tune, len(self.space.branches)), 0),
            self.book,
            draft,
            put,
            FOUR,
            repeats=(lambda: repeats_due(self.book, search.tune, 42)) if search.tune.tournament else None,
            most_at_once=at_once,
            least=least,
            seed=0,
        )

    def take(self, identifier: str) -> Trial | None:
        """The next trial, or None if there is none now."""
        config: Any = self.searcher.suggest(identifier)
        return None if config in (None, Searcher.FINISHED) else self.book.named(config["trial"])

    def end(self, identifier: str, trial: Trial, loss: float = 1.0) -> None:
        trial.state, trial.reports = "finished", [{"step": 100, "eval_loss": loss}]
        self.book.save()
        self.searcher.on_trial_complete(identifier, {"eval_loss": loss, "ended": "finished"})

    def run(self) -> list[Trial]:
        """All trials, one after the other."""
        found: list[Trial] = []
        while (trial := self.take(f"t{len(found)}")) is not None:
            self.end(f"t{len(found)}", trial, loss=float(len(found)))
            found.append(trial)
        return found


@pytest.mark.parametrize("search", ["random", "optuna", "hyperopt"])
def test_equal_points_run_once_and_do_not_count(tmp_path: Path, search: str) -> None:
    ranks = [trial.values["lora_rank"] for trial in Desk(tmp_path, RANKS, search=search, num_samples=4).run()]
    assert sorted(map(int, map(str, ranks))) == [2, 4, 8, 16]


def test_a_search_ends_when_there_are_no_more_points(tmp_path: Path) -> None:
    assert len(Desk(tmp_path, RANKS, search="random", num_samples=50).run()) == 4


def test_points_that_the_plan_refuses_are_never_run_and_counted(tmp_path: Path) -> None:
    desk = Desk(tmp_path, RANKS, search="grid")
    desk.forbidden = {4, 16}
    assert [trial.values["lora_rank"] for trial in desk.run()] == [2, 8]
    assert desk.searcher.refused == {"rank 4 does not fit": 1, "rank 16 does not fit": 1}
    assert desk.placed == [trial.name for trial in desk.book.trials]


def test_trials_start_when_there_is_room_for_their_size(tmp_path: Path) -> None:
    """Four CPUs hold two LoRA trials of two workers; a trial of one finds room beside one of them."""
    desk = Desk(tmp_path, MIXED, search="random", num_samples=20)
    running: dict[str, Trial] = {}
    seen: set[int] = set()
    for number in range(60):
        trial = desk.take(f"t{number}")
        if trial is not None:
            running[f"t{number}"] = trial
        assert sum(one.workers for one in running.values()) <= 4
        if trial is None:
            if not running:
                break
            seen.add(len(running))
            identifier = next(iter(running))
            desk.end(identifier, running.pop(identifier))
    assert len(desk.book.trials) == 20
    assert {trial.workers for trial in desk.book.trials} == {1, 2}
    assert max(seen) >= 3


def test_a_trial_without_room_is_overtaken_by_one_that_has_some(tmp_path: Path) -> None:
    """Of four CPUs three are taken; the next trial wants two, and one that wants one goes first."""
    small = {"finetuning_type": "full", "ray_num_workers": 1}
    space: list[dict[str, Any]] = [
        {**small, "learning_rate": {"choice": [1e-4]}},
        {"finetuning_type": "lora", "lora_rank": {"choice": [2, 4]}},  # on two workers
        {**small, "learning_rate": {"choice": [1e-3, 2e-3]}},
    ]
    desk = Desk(tmp_path, space, search="grid", least=Size(1, {"CPU": 1.0}))
    taken = [desk.take(name) for name in "abcd"]
    assert [trial and trial.workers for trial in taken] == [1, 2, 1, None]
    assert taken[1] is not None
    desk.end("b", taken[1])
    late = desk.take("e")
    assert late is not None
    assert late.values == {"lora_rank": 4}, "who waits goes before who is new"


def test_few_trials_are_overtaken(tmp_path: Path) -> None:
    """Else small trials would keep a large one waiting for ever."""
    space: list[dict[str, Any]] = [
        {"finetuning_type": "full", "ray_num_workers": 1, "learning_rate": {"uniform": [1e-5, 1e-3]}},
        {"finetuning_type": "lora", "lora_rank": {"randint": [1, 500]}},
    ]
    desk = Desk(tmp_path, space, search="random", num_samples=40, least=Size(1, {"CPU": 1.0}))
    running: dict[str, Trial] = {}
    for number in range(200):
        trial = desk.take(f"t{number}")
        if trial is not None:
            running[f"t{number}"] = trial
            continue
        waiting = [one for one in desk.book.trials if not one.ended and one not in running.values()]
        assert len(waiting) <= MOST_OVERTAKEN
        if not running:
            break
        identifier = next((name for name, one in running.items() if one.workers == 1), next(iter(running)))
        desk.end(identifier, running.pop(identifier))
    assert len(desk.book.trials) == 40
    assert all(trial.state == "finished" for trial in desk.book.trials)


def test_paused_trials_hold_no_room(tmp_path: Path) -> None:
    desk = Desk(tmp_path, MIXED[:1], search="random", num_samples=9)
    assert desk.take("a") is not None
    assert desk.take("b") is not None
    assert desk.take("c") is None
    desk.searcher.paused = frozenset({"a"})
    assert desk.take("c") is not None


def test_a_written_limit_is_kept(tmp_path: Path) -> None:
    desk = Desk(tmp_path, MIXED[:1], search="random", num_samples=9, at_once=1)
    assert desk.take("a") is not None
    assert desk.take("b") is None


def test_a_closed_search_hands_nothing_out(tmp_path: Path) -> None:
    desk = Desk(tmp_path, RANKS, search="grid")
    desk.searcher.closed = True
    assert desk.searcher.suggest("a") == Searcher.FINISHED


@pytest.mark.parametrize("search", ["grid", "random", "optuna", "hyperopt"])
def test_after_a_kill_open_trials_come_first_and_nothing_is_repeated_or_lost(tmp_path: Path, search: str) -> None:
    samples: dict[str, Any] = {} if search == "grid" else {"num_samples": 4}
    first = Desk(tmp_path, RANKS, search=search, **samples)
    ended, running = first.take("a"), first.take("b")
    assert ended is not None
    assert running is not None
    first.end("a", ended)
    del first  # killed: nothing else is written

    again = Desk(tmp_path, RANKS, search=search, **samples)
    found = again.run()
    assert found[0].name == running.name
    assert [trial.number for trial in again.book.trials] == [1, 2, 3, 4]
    assert len({trial.digest for trial in again.book.trials}) == 4
    assert len(found) == 3


def test_a_result_that_the_searcher_has_not_heard_of_is_told_again(tmp_path: Path) -> None:
    first = Desk(tmp_path, RANKS, search="optuna", num_samples=4)
    trial = first.take("a")
    assert trial is not None
    trial.state, trial.reports = "finished", [{"step": 100, "eval_loss": 0.5}]
    first.book.save()  # and killed before Tune told the searcher

    again = Desk(tmp_path, RANKS, search="optuna", num_samples=4)
    study: Any = again.searcher._pools[0].searcher.searcher._ot_study  # type: ignore[attr-defined]
    assert [one.value for one in study.get_trials(deepcopy=False) if one.value is not None] == [0.5]


def test_an_interrupted_trial_is_not_told_and_comes_again(tmp_path: Path) -> None:
    first = Desk(tmp_path, RANKS, search="optuna", num_samples=4)
    trial = first.take("a")
    assert trial is not None
    first.searcher.on_trial_complete("a", {"eval_loss": 3.0, "ended": "interrupted"})
    again = Desk(tmp_path, RANKS, search="optuna", num_samples=4)
    taken = again.take("b")
    assert taken is not None
    assert taken.name == trial.name


METHODS: list[dict[str, Any]] = [
    {"finetuning_type": "lora", "ray_num_workers": 1, "lora_rank": {"randint": [1, 500]}},
    {"finetuning_type": "full", "ray_num_workers": 1, "learning_rate": {"uniform": [1e-5, 1e-3]}},
    {"finetuning_type": "freeze", "ray_num_workers": 1, "learning_rate": {"uniform": [1e-5, 1e-3]}},
]


@pytest.mark.parametrize("search", ["random", "optuna", "hyperopt"])
def test_a_tournament_gives_each_method_as_many_trials_then_repeats_the_best_of_each(
    tmp_path: Path, search: str
) -> None:
    desk = Desk(tmp_path, METHODS, search=search, num_samples=9, tournament=True, finalist_seeds=2)
    found = desk.run()
    sampled, repeats = found[:9], found[9:]
    # In turns, so that a budget that ends early has been shared as well.
    assert [trial.branch for trial in sampled] == [0, 1, 2] * 3
    # Losses are the trials' numbers, so the first of each method is its finalist; one seed of all, then the next.
    assert [(trial.repeats, trial.seed) for trial in repeats] == [(1, 43), (2, 43), (3, 43), (1, 44), (2, 44), (3, 44)]
    assert [trial.values for trial in repeats[:3]] == [trial.values for trial in sampled[:3]]
    assert len({trial.name for trial in found}) == 15


def test_finalists_are_chosen_when_every_bracket_has_ended(tmp_path: Path) -> None:
    desk = Desk(tmp_path, METHODS, search="random", num_samples=3, tournament=True, finalist_seeds=1)
    running = {name: desk.take(name) for name in ("a", "b", "c")}
    for name in ("a", "b"):
        trial = running[name]
        assert trial is not None
        desk.end(name, trial)
        assert desk.searcher.suggest("d") is None  # not now, and not the end
    last = running["c"]
    assert last is not None
    desk.end("c", last)
    final = desk.take("d")
    assert final is not None
    assert final.repeats == 1


def test_a_tournament_that_was_killed_among_its_repeats_goes_on_with_those_left(tmp_path: Path) -> None:
    block: dict[str, Any] = {"search": "optuna", "num_samples": 6, "tournament": True, "finalist_seeds": 2}
    first = Desk(tmp_path, METHODS, **block)
    for number in range(7):
        trial = first.take(f"t{number}")
        assert trial is not None
        if number < 6:
            first.end(f"t{number}", trial, loss=float(number))
    del first  # killed while the first repeat runs

    again = Desk(tmp_path, METHODS, **block)
    found = again.run()
    assert [(trial.number, trial.repeats, trial.seed) for trial in found] == [
        (7, 1, 43),
        (8, 2, 43),
        (9, 3, 43),
        (10, 1, 44),
        (11, 2, 44),
        (12, 3, 44),
    ]


def test_more_trials_of_a_tournament_that_make_another_finalist_repeat_that_one(tmp_path: Path) -> None:
    block: dict[str, Any] = {"search": "random", "tournament": True, "finalist_seeds": 1}
    Desk(tmp_path, METHODS, **block, num_samples=3).run()
    again = Desk(tmp_path, METHODS, **block, num_samples=6)
    for number in range(3):
        trial = again.take(f"t{number}")
        assert trial is not None
        again.end(f"t{number}", trial, loss=-1.0 if trial.branch == 1 else 9.0)
    found = again.run()
    assert [(trial.branch, trial.repeats) for trial in found] == [(1, 8)]
