"""A worker looks at how many it is among, whatever the plan and Ray have seen to before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunefleet.errors import Refused, RunFailed
from tunefleet.launch.cluster import local_shape
from tunefleet.launch.draft import draft
from tunefleet.plan import Plan
from tunefleet.recipe.read import read_flat
from tunefleet.worker.seat import Seat, among_nodes, check_seat


@pytest.fixture
def planned(tmp_path: Path, tiny_model: Path) -> Plan:
    recipe = read_flat(
        {
            "model_name_or_path": str(tiny_model),
            "finetuning_type": "full",
            "use_badam": True,
            "badam_mode": "ratio",
            "dataset": "quickstart_train",
            "output_dir": "out",
            "resources_per_worker": {"CPU": 1},
        }
    )
    return draft(recipe, local_shape(recipe.ray), tmp_path, with_data=False)


def test_ratio_mode_sits_alone(planned: Plan) -> None:
    check_seat(planned, Seat(0, 1, torch.device("cpu")))
    with pytest.raises(Refused) as caught:
        check_seat(planned, Seat(1, 2, torch.device("cpu")))
    assert str(caught.value) == (
        "badam with badam_mode: ratio runs on one worker, but Ray started 2: write ray_num_workers: 1."
    )


def test_another_number_than_planned_is_a_failure(planned: Plan) -> None:
    keys = planned.recipe.flat() | {"badam_mode": "layer"}
    layer = planned.model_copy(update={"recipe": read_flat(keys, written=())})
    with pytest.raises(RunFailed, match="Ray started 2 worker"):
        check_seat(layer, Seat(0, 2, torch.device("cpu")))


def test_ranks_are_counted_within_their_node() -> None:
    node_ids = ["b", "a", "b", "b", "a"]
    seats = [
        among_nodes(Seat(rank, 5, torch.device("cpu"), node_id=one), node_ids) for rank, one in enumerate(node_ids)
    ]
    assert [seat.local_rank for seat in seats] == [0, 0, 1, 2, 1]
    assert [seat.node for seat in seats] == [0, 1, 0, 0, 1]


def test_an_elastic_run_takes_any_number_within_its_range(planned: Plan) -> None:
    keys = planned.recipe.flat() | {"badam_mode": "layer"}
    workers = planned.workers.model_copy(update={"least": 2, "count": 3})
    layer = planned.model_copy(update={"recipe": read_flat(keys, written=()), "workers": workers})
    for world in (2, 3):
        check_seat(layer, Seat(0, world, torch.device("cpu")))
    for world in (1, 4):
        with pytest.raises(RunFailed, match=rf"Ray started {world} worker\(s\) where the plan has 2 to 3\."):
            check_seat(layer, Seat(0, world, torch.device("cpu")))
