"""One space, every way of searching it: what is proposed is a point of the space, and nothing unresolved."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tests.search.test_opening import opened

from tunefleet.errors import Refused
from tunefleet.recipe.tune import TuneSettings, search_from
from tunefleet.search.searchers import PACKAGES, Suggestion, Suggestions, refuse_missing, suggestions
from tunefleet.search.space import Space

MIXED = [
    {
        "finetuning_type": "lora",
        "lora_rank": {"choice": [4, 8, 16]},
        "learning_rate": {"loguniform": [1e-5, 1e-3]},
        "lora_target": {"choice": ["all", ["q_proj", "v_proj"]]},
    },
    {
        "finetuning_type": "full",
        "use_badam": True,
        "badam_mask_mode": {"choice": ["adjacent", "scatter"]},
        "badam_mode": {"choice": ["layer", "ratio"]},
        "badam_switch_interval": {"randint": [10, 100]},
        "weight_decay": {"quniform": [0.01, 0.1, 0.03]},
        "max_grad_norm": {"uniform": [0.5, 2]},
    },
]
KINDS = ["random", "optuna", pytest.param("hyperopt"), "bohb"]


def settings(**block: object) -> TuneSettings:
    return search_from({"tune": {"space": "auto", **block}}).tune


def searcher(kind: str, space: Space, seed: int = 1) -> Suggestions:
    for package in PACKAGES.get(kind, ()):
        pytest.importorskip(package)
    more = {"scheduler": "hyperband"} if kind == "bohb" else {}
    return suggestions(space, settings(search=kind, **more), seed)


def space_for(kind: str) -> Space:
    return opened(MIXED[1:] if kind == "bohb" else MIXED)


def asked(source: Suggestions, count: int, first: int = 0) -> list[Suggestion]:
    found: list[Suggestion] = []
    for number in range(first, first + count):
        proposed = source.ask(f"asked_{number}")
        assert proposed is not None
        source.tell(f"asked_{number}", {"step": 10, "eval_loss": 3.0 - number / 100})
        found.append(proposed)
    return found


def of_the_space(space: Space, proposed: Suggestion) -> bool:
    """Whether all values are plain ones of the branch's domains, and exactly those that mean something."""
    branch = space.branches[proposed.branch]
    point = branch.point(proposed.values)
    plain = all(isinstance(value, bool | int | float | str | tuple) for value in proposed.values.values())
    return plain and set(point.values) == set(proposed.values)


@pytest.mark.parametrize("kind", KINDS)
def test_proposals_are_points_of_the_space_from_all_of_its_branches(kind: str) -> None:
    space = space_for(kind)
    found = asked(searcher(kind, space), 40)
    assert all(of_the_space(space, proposed) for proposed in found)
    assert {proposed.branch for proposed in found} == set(range(len(space.branches)))
    modes = {proposed.values.get("badam_mode") for proposed in found} - {None}
    assert modes == {"layer", "ratio"}
    decays = {proposed.values.get("weight_decay") for proposed in found} - {None}
    assert decays <= {0.01, 0.04, 0.07, 0.1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_searcher_goes_on_from_its_state(kind: str) -> None:
    space = space_for(kind)
    one, other = searcher(kind, space), searcher(kind, space)
    asked(one, 30)
    other.restore(one.state())
    found = asked(one, 5, first=30)
    np.random.random()  # others draw as well
    assert asked(other, 5, first=30) == found


def test_a_grid_walks_every_point_once() -> None:
    space = opened(
        [{"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}, "use_dora": {"choice": [True, False]}}]
    )
    source = searcher("grid", space)
    found = [proposed.values for proposed in iter(lambda: source.ask("x"), None)]
    ranks, doras = (4, 8), (True, False)
    assert found == [{"lora_rank": rank, "use_dora": dora} for rank, dora in itertools.product(ranks, doras)]


def test_optuna_is_asked_only_for_what_has_a_meaning() -> None:
    """Else it would learn from numbers that did nothing."""
    source: Any = searcher("optuna", opened(MIXED[1:]))
    asked(source, 20)
    for trial in source.searcher._ot_study.get_trials(deepcopy=False):
        assert ("0.badam_mask_mode" in trial.params) == (trial.params["0.badam_mode"] == 1)


@pytest.mark.parametrize("kind", ["optuna", "bohb"])
def test_searchers_learn(kind: str) -> None:
    """Ranks that were told to be good are proposed far more often in the end."""
    space = opened([{"finetuning_type": "lora", "lora_rank": {"randint": [1, 200]}}])
    source = searcher(kind, space)
    found: list[int] = []
    for number in range(60):
        proposed = source.ask(f"asked_{number}")
        assert proposed is not None
        rank = int(str(proposed.values["lora_rank"]))
        found.append(rank)
        source.tell(f"asked_{number}", {"step": 40, "eval_loss": abs(rank - 150) / 100})
    assert sum(abs(rank - 150) < 25 for rank in found[-20:]) >= 12


def test_optuna_follows_several_metrics() -> None:
    space = opened(MIXED)
    block: Mapping[str, Any] = {"metric": ["eval_loss", "seconds"], "mode": ["min", "min"]}
    source = suggestions(space, settings(**block), 0)
    for number in range(12):
        assert source.ask(f"asked_{number}") is not None
        source.tell(f"asked_{number}", {"eval_loss": 1.0, "seconds": float(number)})


def test_bohb_believes_what_it_heard_of_the_most_steps() -> None:
    """Small ranks look best at a rung, large ones at the end. What a rung says counts once, other figures never."""
    space = opened([{"finetuning_type": "lora", "lora_rank": {"randint": [1, 200]}}])
    source = searcher("bohb", space)
    found: list[int] = []
    for number in range(60):
        identifier = f"asked_{number}"
        proposed = source.ask(identifier)
        assert proposed is not None
        rank = int(str(proposed.values["lora_rank"]))
        found.append(rank)
        source.hear(identifier, {"step": 5, "eval_loss": -rank, "hyperband_info": {}})
        for _ in range(2):
            source.hear(identifier, {"step": 10, "eval_loss": rank / 100, "hyperband_info": {"budget": 1}})
        source.tell(identifier, {"step": 40, "eval_loss": abs(rank - 150) / 100})
    assert sum(abs(rank - 150) < 25 for rank in found[-20:]) >= 12
    told: Any = source
    losses = told.searcher.bohber.losses
    assert losses.keys() == {10, 40}
    assert len(losses[40]) == 60
    assert losses[10] == [rank / 100 for rank in found[: len(losses[10])]]  # until it had a model of 40 steps


@pytest.mark.parametrize("kind", ["hyperopt", "bohb"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Refused, match=rf"run `pip install 'tunefleet\[{kind}\]'`, or write search: optuna"):
        refuse_missing(kind)
