"""What searches are set beside, and when a goal counts as reached."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import search_quality
import yaml
from search_quality import GRID, GRID_KEYS, RECIPE, Beside, beside, default_branch, executed, rates, whole

from tunefleet.recipe.tune import search_from
from tunefleet.search.opening import open_space


def trial(loss: float | None, steps: int, state: str = "finished") -> dict[str, object]:
    return {"eval_loss": loss, "steps": steps, "state": state}


def test_rates_lie_in_the_middle_of_equal_parts() -> None:
    assert rates({"loguniform": [1e-6, 1.0]}, 3) == [1e-5, 1e-3, 1e-1]


def test_each_method_is_tried_with_its_defaults_at_three_rates() -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    branches = [default_branch(branch) for branch in recipe["tune"]["space"]]
    space = open_space(search_from({**recipe, "tune": {"search": "grid", "space": branches}}))
    points = list(space.points())
    assert len(points) == 9
    assert all(set(point.values) == {"learning_rate"} for point in points)


def test_the_grid_of_asha_is_a_grid() -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    space = open_space(search_from({**recipe, **GRID_KEYS, "tune": {"search": "grid", "space": [GRID]}}))
    assert len(list(space.points())) == 21


def test_what_counts_is_whole_trials_best_first() -> None:
    trials = [trial(3.0, 9), trial(1.0, 4, "stopped"), trial(2.0, 9), trial(None, 9)]
    assert [one["eval_loss"] for one in whole(trials)] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("found", "steps", "middle", "good"),
    [(1.01, 35, 1.05, True), (1.02, 35, 1.05, False), (1.0, 36, 1.05, False), (1.0, 35, 1.04, False)],
)
def test_every_goal_must_be_reached(found: float, steps: int, middle: float, good: bool) -> None:
    assert Beside(1.0, middle, found, steps, 100).good is good


def test_asha_is_set_beside_the_grid() -> None:
    grid = [trial(1.0, 50), trial(2.0, 50), trial(4.0, 50)]
    stopped = [trial(1.5, 10, "stopped"), trial(1.0, 50)]
    assert beside(grid, stopped, 63) == Beside(best=1.0, middle=2.0, found=1.0, steps=63, all_steps=150)


def test_steps_that_a_stopped_trial_took_before_it_heard_of_it_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_quality, "REPOSITORY", tmp_path)
    record = tmp_path / search_quality.FOLDER / "runs" / "asha_0" / "trials" / "trial_0001" / "record"
    record.mkdir(parents=True)
    attempts = [{"attempt": number, "start_step": 0, "executed_steps": 6} for number in (1, 2)]
    (record / "attempts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in attempts))
    assert executed("asha_0", [{"run": "trial_0001", "steps": 10}]) == 12


@pytest.mark.parametrize(("written", "run"), [([], ["methods", "asha"]), (["asha"], ["asha"])])
def test_a_part_may_be_named(
    written: list[str], run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def part(name: str) -> tuple[str, dict[str, Any], bool]:
        ran.append(name)
        return name, {}, name == "asha"

    monkeypatch.setattr(search_quality, "PARTS", {name: partial(part, name) for name in ("methods", "asha")})
    monkeypatch.setattr(search_quality, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["search_quality.py", *written])
    assert search_quality.main() == (0 if written else 1)
    assert ran == run
    assert sorted(file.name for file in tmp_path.glob("*.md")) == sorted(f"search_{name}.md" for name in run)
