"""Populations without Ray: who goes on from whom, and that it is the donor's state that goes on."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Trial as RayTrial
from tests.search.herd import herd
from tests.search.test_book import trial
from tests.worker.under_ray import World

from tunefleet.artifacts.record import read_attempts
from tunefleet.errors import Refused
from tunefleet.launch.runs import hand_down, open_run
from tunefleet.recipe.tune import TuneSettings, search_from
from tunefleet.search.book import Book, Trial
from tunefleet.search.driven import Driven, Leg
from tunefleet.search.population import (
    first_turn,
    heirs,
    kept_as_they_are,
    perturbed,
    refuse_population,
    turn_steps,
)
from tunefleet.search.schedulers import Clock
from tunefleet.search.tuner import Scribe
from tunefleet.storage import Place, place
from tunefleet_strategies.carry import mutable_keys
from tunefleet_strategies.contract import Choice, Domain, LogUniform, QUniform, RandInt, Uniform

CLOCK = Clock(updates=90, interval=10, grace=10)


def settings(**block: object) -> TuneSettings:
    return search_from({"tune": {"space": "auto", "scheduler": "pbt", **block}}).tune


# ---- who goes on from whom, and with which values ------------------------------------------------------------------


def members(*losses: float) -> list[Trial]:
    return [replace(trial(number, "paused", loss), until=10) for number, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "fraction", "mode", "best", "worst"),
    [
        ((5, 1, 3, 2), 0.25, "min", {2}, {1}),
        ((5, 1, 3, 2), 0.25, "max", {1}, {2}),
        ((5, 1, 3, 2, 4, 6, 7, 8), 0.25, "min", {2, 4}, {7, 8}),
        ((5, 1, 3), 0.5, "min", {2}, {1}),  # never more than half
        ((5, float("nan"), 3, 2), 0.25, "min", {4}, {2}),
        ((5, float("inf"), 3, 2), 0.25, "max", {1}, {2}),
    ],
)
def test_the_worst_go_on_from_the_best(
    losses: tuple[float, ...], fraction: float, mode: str, best: set[int], worst: set[int]
) -> None:
    tune = settings(quantile_fraction=fraction, mode=mode)
    pairs = heirs(members(*losses), 10, tune, random.Random(0))
    assert {heir.number for heir, _ in pairs} == worst
    assert {donor.number for _, donor in pairs} <= best


def test_who_is_not_worse_keeps_its_state() -> None:
    assert heirs(members(1, 1, 1, 1), 10, settings(), random.Random(0)) == []
    assert heirs(members(1), 10, settings(), random.Random(0)) == []


@pytest.mark.parametrize(
    ("domain", "value"),
    [
        (Choice((4, 8, 16)), 8),
        (Choice((4, 8, 16)), 16),
        (RandInt(2, 9), 3),
        (RandInt(2, 9), 8),
        (Uniform(0.0, 0.1), 0.05),
        (Uniform(0.0, 0.1), 0.0),
        (LogUniform(1e-5, 1e-3), 1e-3),
        (QUniform(0.0, 0.1, 0.02), 0.04),
    ],
)
def test_values_change_a_little_and_stay_in_their_domain(domain: Domain, value: Any) -> None:
    chance = random.Random(0)
    found = [
        perturbed({"it": value, "other": 1}, {"it": domain, "other": Choice((1, 2))}, frozenset({"it"}), chance)
        for _ in range(200)
    ]
    assert all(one["other"] == 1 for one in found)
    values: list[Any] = [one["it"] for one in found]
    assert len(set(values)) > 1
    if isinstance(domain, Choice):
        assert set(values) <= set(domain.values)
    else:
        most = domain.high - 1 if isinstance(domain, RandInt) else domain.high
        assert all(domain.low <= one <= most for one in values)


def test_most_changes_are_by_a_fifth() -> None:
    chance = random.Random(0)
    domain = {"learning_rate": LogUniform(1e-9, 1.0)}
    found = [perturbed({"learning_rate": 1e-4}, domain, frozenset(domain), chance)["learning_rate"] for _ in range(400)]
    assert 250 < sum(one in (8e-5, 1.2e-4) for one in found) < 350


def test_a_population_is_compared_about_four_times_a_trial() -> None:
    assert turn_steps(settings(), CLOCK) == 20
    assert turn_steps(settings(perturbation_interval=30), CLOCK) == 30
    assert first_turn(settings(perturbation_interval=90), CLOCK) is None


# ---- states that go on ----------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> World:
    return World(tmp_path, tiny_model, quickstart_world, "nowhere")


ONE: dict[str, Any] = {"ray_num_workers": 1}
FORMS: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora", "lora_dropout": 0.1, "lora_rank": {"choice": [4, 8]}},
    "galore": {
        "finetuning_type": "full",
        "use_galore": True,
        "galore_update_interval": 50,
        "galore_rank": {"choice": [4, 8]},
    },
    "badam": {"finetuning_type": "full", "use_badam": True, "badam_switch_interval": {"choice": [3, 7]}},
    "full": {"finetuning_type": "full", "weight_decay": {"choice": [0.0, 0.1]}},
}


@pytest.mark.parametrize(
    "form", ["lora", *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form != "lora")]
)
def test_an_heir_goes_on_from_the_donors_state_under_changed_values(world: World, form: str) -> None:
    made = herd(world, [{**FORMS[form], **ONE}], learning_rate=1e-3, max_steps=30)
    donor, heir = made.book.trials
    before = copy.deepcopy(heir.values)
    plans = made.population().turn([heir, donor])
    assert list(plans) == [heir.name]
    (exploit,) = heir.exploits
    assert (exploit["step"], exploit["donor"], exploit["before"]) == (10, 1, before)
    assert heir.values == exploit["values"] != donor.values
    assert (donor.until, heir.until, donor.exploits) == (20, 20, [])
    lineage = json.loads(made.folder(heir).record.child("lineage.json").read_text())
    assert lineage == [{"step": 10, "from": donor.name, "before": donor.values, "values": heir.values}]

    for one in (donor, heir):
        ending = made.train(one, 20)
        assert (ending["stopped"], ending["step"], ending["executed_steps"]) == (True, 20, 10)
    # The same weights meet the same batch, with the same dropout; after that they part.
    assert made.losses(heir)[11] == pytest.approx(made.losses(donor)[11], rel=1e-5)
    assert [made.losses(heir)[step] for step in range(1, 11)] == [made.losses(donor)[step] for step in range(1, 11)]
    assert made.losses(heir)[20] != made.losses(donor)[20]
    assert read_attempts(Path(made.folder(heir).record.path))[-1]["start_step"] == 10
    # It goes on from a checkpoint of its own, as any run does, and to the end.
    for one in (donor, heir):
        assert made.train(one, None)["step"] == 30


@pytest.mark.slow
def test_the_schedule_goes_on_at_the_donors_step_under_the_new_peak(world: World) -> None:
    made = herd(world, [{"finetuning_type": "lora", **ONE, "learning_rate": {"choice": [1e-3, 2e-3]}}])
    donor, heir = made.book.trials
    made.population().turn([donor, heir])
    peaks = [made.plan(one).recipe.training.learning_rate for one in (donor, heir)]
    assert peaks[0] != peaks[1]
    for one in (donor, heir):
        made.train(one, 12)
    rates = [{line["step"]: line.get("learning_rate") for line in made.lines(one)} for one in (donor, heir)]
    assert rates[1][11] / peaks[1] == pytest.approx(rates[0][11] / peaks[0])  # type: ignore[operator]
    assert made.losses(heir)[11] == made.losses(donor)[11]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "where", ["upload", pytest.param("record", marks=pytest.mark.slow), pytest.param("book", marks=pytest.mark.slow)]
)
def test_a_turn_that_is_killed_on_the_way_is_made_again_alike(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = [{"finetuning_type": "lora", "ray_num_workers": 1, "lora_rank": {"choice": [4, 6, 8]}}]
    made = herd(world, space)
    names = [one.name for one in made.book.trials]

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if where == "book":
            patch.setattr(Book, "save", die)
        elif where == "upload":
            patch.setattr(Place, "upload", die)
        else:
            patch.setattr("tunefleet.search.population.hand_down", die)
        with pytest.raises(Killed):
            made.population().turn(list(made.book.trials))

    kept = Book(made.shop.search)  # what the next command finds
    assert [one.until for one in kept.trials] == [10, 10, 10]
    assert not any(one.exploits for one in kept.trials)
    again = replace(made, book=kept)
    again.population().turn(list(kept.trials))
    heir = next(one for one in kept.trials if one.exploits)
    again.train(heir, 20)

    whole = world.folder / "runs" / "search"
    whole.rename(world.folder / "runs" / "killed")
    twin = herd(world, space)
    assert [one.name for one in twin.book.trials] == names
    twin.population().turn(list(twin.book.trials))
    twin_heir = next(one for one in twin.book.trials if one.exploits)
    twin.train(twin_heir, 20)
    assert (twin_heir.name, twin_heir.values) == (heir.name, heir.values)
    killed = replace(again, shop=replace(again.shop, search=place(world.folder / "runs" / "killed")))
    assert killed.losses(heir) == twin.losses(twin_heir)


def test_a_run_goes_on_under_other_values_by_a_turn_only_and_only_those_that_may_change(world: World) -> None:
    made = herd(world, [{"finetuning_type": "lora", **ONE, "learning_rate": {"choice": [1e-3, 2e-3]}}])
    donor, heir = made.book.trials
    with pytest.raises(Refused, match=r"was started with other values .*learning_rate"):
        open_run(made.plan(donor), made.folder(heir))
    other = made.plan(heir)
    recipe = other.recipe.model_copy(
        update={
            "training": other.recipe.training.model_copy(update={"adam_beta2": 0.5, "learning_rate": 0.5}),
        }
    )
    with pytest.raises(Refused, match=r"cannot go on from .* with other values \(adam_beta2: 0.999 -> 0.5\): only "):
        hand_down(
            made.folder(donor),
            made.folder(heir),
            other.model_copy(update={"recipe": recipe}),
            mutable_keys(recipe.method),
            {},
        )


def test_a_run_that_was_killed_where_it_rests_says_from_its_checkpoint_what_it_had_to_report(world: World) -> None:
    made = herd(world, [{"finetuning_type": "full", **ONE, "learning_rate": {"choice": [1e-3]}}], real=True)
    (one,) = made.book.trials

    def rested_at(until: int | None) -> dict[str, Any] | None:
        nobody: Any = None  # nothing is started
        return Driven(one.name, made.shop.search, True, 10, nobody, nobody, Leg(until=until))._rested()

    rested = rested_at(10)
    assert rested is not None
    assert (rested["step"], rested["eval_loss"]) == (10, one.reports[0]["eval_loss"])
    assert rested["loss"] == made.losses(one)[10]
    assert rested_at(20) is None
    assert rested_at(None) is None


def test_a_figure_that_is_told_again_after_a_restart_is_known_already(tmp_path: Path) -> None:
    """As by a trial whose state was taken over just before its driver was killed: it stands where it stood."""
    book = Book(place(tmp_path))
    book.trials = [replace(trial(1, "running", 2.0), until=10)]
    nobody: Any = None
    scribe = Scribe(book, nobody, place(tmp_path), CLOCK)
    told = RayTrial("tunefleet", config={"trial": book.trials[0].name}, trial_id="a", stub=True)
    for step, loss in ((10, 1.0), (20, 0.5)):
        scribe.on_trial_result(0, [], told, {"step": step, "eval_loss": loss, "seconds": 9.0})
    assert [report["eval_loss"] for report in book.trials[0].reports] == [2.0, 0.5]


def test_what_no_state_can_be_handed_on_of_is_refused(world: World) -> None:
    made = herd(world, [{"finetuning_type": "full", **ONE, "learning_rate": {"choice": [1e-3]}}])
    tune, plans = made.shop.tune, made.shop.survey()
    refuse_population(tune, made.time, plans)
    with pytest.raises(Refused, match=r"perturbation_interval: 15 is no whole number of intervals of 10 .*: write 20"):
        refuse_population(tune.model_copy(update={"perturbation_interval": 15}), made.time, plans)
    changes: list[tuple[Mapping[str, object], str]] = [
        ({"sharding": "zero3"}, "write sharding: none"),
        ({"resumable": False}, "write save_only_model: false"),
    ]
    for update, mend in changes:
        with pytest.raises(Refused, match=mend):
            refuse_population(tune, made.time, [replace(plans[0], plan=plans[0].plan.model_copy(update=update))])


def test_a_searched_key_that_the_form_of_a_method_fixes_is_named(world: World) -> None:
    space = [{"finetuning_type": "lora", "pissa_init": True, **ONE, "lora_rank": {"choice": [4]}}]
    space[0]["learning_rate"] = {"choice": [1e-3]}
    (sentence,) = kept_as_they_are(herd(world, space).shop.survey())
    assert sentence.startswith("pbt changes no lora_rank of lora: pissa_init made the base")
