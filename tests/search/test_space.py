"""Branches and points: what is sampled beside what, which points are equal, which are never taken."""

from __future__ import annotations

import random

from tests.search.test_opening import opened

BADAM = {"finetuning_type": "full", "use_badam": True}
MODES = {"badam_mask_mode": {"choice": ["adjacent", "scatter"]}, "badam_mode": {"choice": ["layer", "ratio"]}}


def test_a_key_without_meaning_is_not_sampled_wherever_it_is_written() -> None:
    space = opened([{**BADAM, **MODES}])
    assert list(space.branches[0].domains) == ["badam_mode", "badam_mask_mode"]
    assert [dict(point.values) for point in space.points()] == [
        {"badam_mode": "layer"},
        {"badam_mode": "ratio", "badam_mask_mode": "adjacent"},
        {"badam_mode": "ratio", "badam_mask_mode": "scatter"},
    ]
    drawn = [space.draw(random.Random(seed))[1] for seed in range(20)]
    assert all(("badam_mask_mode" in values) == (values["badam_mode"] == "ratio") for values in drawn)


def test_points_that_are_equal_after_defaults_are_one() -> None:
    space = opened([{"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}, {"finetuning_type": "lora"}])
    eight, default = space.point(0, {"lora_rank": 8}), space.point(1, {})
    assert eight.digest == default.digest  # 8 is the default rank
    assert [point.values for point in space.points()] == [{"lora_rank": 4}, {"lora_rank": 8}]


def test_what_does_nothing_tells_no_points_apart() -> None:
    space = opened([{**BADAM, **MODES}])
    assert space.point(0, {"badam_mode": "layer", "badam_mask_mode": "scatter"}) == space.point(
        0, {"badam_mode": "layer"}
    )


def test_points_that_the_rules_refuse_are_left_out() -> None:
    switches = {"pure_bf16": {"choice": [True, False]}, "bf16": {"choice": [True, False]}}
    taken = [dict(point.values) for point in opened([{"finetuning_type": "full", **switches}]).points()]
    assert {"pure_bf16": True, "bf16": False} not in taken
    assert len(taken) == 3


def test_where_the_results_go_tells_no_points_apart_and_workers_do() -> None:
    here, there = (opened([{"finetuning_type": "lora"}], output_dir=name).point(0, {}) for name in ("here", "there"))
    assert here.digest == there.digest
    order = opened([{"finetuning_type": "lora", "ray_num_workers": {"choice": [1, 2]}}])
    assert len({order.point(0, {"ray_num_workers": count}).digest for count in (1, 2)}) == 2


def test_what_is_drawn_is_inside_the_domain_and_short() -> None:
    space = opened([{"finetuning_type": "full", "learning_rate": {"loguniform": [1.2345678e-5, 1e-3]}}])
    chance = random.Random(0)
    rates = [float(str(space.draw(chance)[1]["learning_rate"])) for _ in range(200)]
    assert all(1.2345678e-5 <= rate <= 1e-3 for rate in rates)
    assert all(len(f"{rate:.12g}".split("e")[0].replace(".", "").lstrip("0")) <= 8 for rate in rates)
    assert sum(rate < 1e-4 for rate in rates) in range(70, 130)  # half of the logarithm
