"""Workers and batches of trials: the same global batch for all, whatever the method allows; who fits beside whom."""

from __future__ import annotations

from typing import Any

import pytest
from tests.search.illegal import BASE
from tests.search.test_opening import opened

from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.recipe.read import read_flat
from tunefleet.search.sizing import Batch, Size, fit, fitted, most_at_once, trial_keys, trial_recipe
from tunefleet.shapes import SINGLE_WORKER, ClusterShape, NodeShape

BADAM = {"finetuning_type": "full", "use_badam": True}
RATIO = {**BADAM, "badam_mode": "ratio"}
LAYERWISE = {"finetuning_type": "full", "use_galore": True, "galore_layerwise": True}
ONE, TWO = Size(1, {"CPU": 1.0}), Size(2, {"CPU": 1.0})


def sized(branch: dict[str, object], **base: object) -> tuple[int, int, int]:
    """Workers, micro-batch and accumulation of a branch's trial."""
    shared: dict[str, Any] = {**BASE, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, **base}
    space = opened([branch], **shared)
    recipe = read_flat(trial_keys(space.branches[0], {}, shared))
    training = recipe.training
    return recipe.ray.max_workers, training.per_device_train_batch_size, training.gradient_accumulation_steps


def machines(*cpus: float) -> ClusterShape:
    return ClusterShape(tuple(NodeShape(count) for count in cpus), cpu=Hardware("cpu", bf16=False))


@pytest.mark.parametrize(
    ("branch", "base", "size"),
    [
        ({"finetuning_type": "lora"}, {}, (2, 4, 3)),
        (RATIO, {}, (1, 4, 6)),  # one worker takes the samples of two
        (LAYERWISE, {}, (1, 24, 1)),  # and where it cannot accumulate, at once
        (BADAM, {}, (2, 4, 3)),
        ({"finetuning_type": "lora", "ray_num_workers": 1}, {}, (1, 4, 6)),  # an order, the same global batch
        ({"finetuning_type": "lora", "ray_num_workers": 4}, {}, (4, 3, 2)),
        ({"finetuning_type": "lora"}, {"ray_num_workers": None}, (1, 4, 3)),
        (RATIO, {"ray_num_workers": 3, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 1}, (1, 5, 3)),
    ],
)
def test_workers_and_batch_of_a_trial(
    branch: dict[str, object], base: dict[str, object], size: tuple[int, int, int]
) -> None:
    assert sized(branch, **base) == size


def test_the_sampled_mode_decides_how_many_workers() -> None:
    shared: dict[str, Any] = {**BASE, "per_device_train_batch_size": 4}
    (branch,) = opened([{**BADAM, "badam_mode": {"choice": ["layer", "ratio"]}}], **shared).branches
    workers = {mode: trial_keys(branch, {"badam_mode": mode}, shared)["ray_num_workers"] for mode in ("layer", "ratio")}
    assert workers == {"layer": 2, "ratio": 1}


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(Refused, match="ray_num_workers: 5 cannot share the search's global batch of 24 samples evenly"):
        sized({"finetuning_type": "lora", "ray_num_workers": 5})


def test_elastic_wishes_are_refused() -> None:
    with pytest.raises(Refused, match="write one number"):
        sized({"finetuning_type": "lora"}, ray_num_workers=[1, 2])


@pytest.mark.parametrize("samples", [1, 6, 7, 16, 30])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 4, 5, 64])
def test_the_global_batch_is_kept(samples: int, workers: int, micro: int) -> None:
    now = Batch(micro, 1)
    if samples % workers:
        with pytest.raises(Refused):
            fitted(samples, workers, now, accumulates=True)
        return
    batch = fitted(samples, workers, now, accumulates=True)
    assert batch.micro * batch.accumulation * workers == samples
    assert batch.micro <= micro
    assert fitted(samples, workers, now, accumulates=False) == Batch(samples // workers, 1)


def test_a_trials_recipe_is_the_points_with_a_place_of_its_own() -> None:
    recipe = trial_recipe({**BASE, "finetuning_type": "lora", "overwrite_output_dir": True}, "trial_1", "/store")
    assert (recipe.run_name, recipe.ray.ray_storage_path, recipe.run.save_total_limit) == ("trial_1", "/store", 1)
    assert not recipe.run.overwrite_output_dir


def test_trials_of_several_sizes_side_by_side() -> None:
    assert fit([TWO, ONE, ONE], machines(4))
    assert not fit([TWO, TWO, ONE], machines(4))
    assert fit([TWO, TWO], machines(1, 1, 2))
    assert not fit([Size(1, {"CPU": 2.0})], machines(1, 1))  # a worker is whole on one machine
    assert (most_at_once(TWO, machines(5), 9), most_at_once(ONE, machines(2, 2), 9)) == (2, 4)
    assert most_at_once(ONE, machines(2, 2), 3) == 3
    assert most_at_once(Size(1, {"GPU": 1.0, "CPU": 1.0}), machines(8), 9) == 0


def test_workers_that_must_be_together_share_a_machine() -> None:
    together = Size(2, {"CPU": 1.0}, together=True)
    assert fit([TWO, TWO], machines(1, 1, 2))
    assert not fit([together, together], machines(1, 1, 2))
    assert fit([together, ONE, ONE], machines(2, 1, 1))


def test_trials_go_where_they_leave_the_least() -> None:
    sizes = [Size(1, {"CPU": cpus}) for cpus in (2.0, 3.0, 2.0)]
    assert fit(sizes, machines(4, 3)), "with three on the larger machine there were no place for the last"


def test_trials_that_may_go_anywhere_leave_room_for_those_that_may_not() -> None:
    small = NodeShape(1, labels={SINGLE_WORKER: "true"})
    cluster = ClusterShape((small, NodeShape(1)), cpu=Hardware("cpu", bf16=False))
    assert fit([ONE, Size(1, {"CPU": 1.0}, {SINGLE_WORKER: "true"})], cluster)


def test_trials_that_are_kept_to_some_machines_find_room_there_only() -> None:
    small = NodeShape(1, labels={SINGLE_WORKER: "true"})
    cluster = ClusterShape((small, NodeShape(2)), cpu=Hardware("cpu", bf16=False))
    alone = Size(1, {"CPU": 1.0}, {SINGLE_WORKER: "true"})
    pair = Size(2, {"CPU": 1.0}, {SINGLE_WORKER: "!true"})
    assert fit([alone, pair], cluster)
    assert not fit([alone, alone], cluster)
    assert not fit([pair, pair], cluster)
