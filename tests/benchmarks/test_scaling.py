"""Which cells are measured, and what is read from a run."""

from __future__ import annotations

import pytest
from scaling import Cell, Measured, cells, measured, table

from tunefleet.places import matrix
from tunefleet.recipe.read import read_flat


def test_every_cell_that_says_yes_is_measured() -> None:
    yes = sum(cell.refusal is None for line in matrix() for cell in line.cells)
    assert len(cells([])) >= yes > 0
    assert {cell.method for cell in cells(["lora", "badam"])} == {"lora", "badam"}


@pytest.mark.parametrize("cell", cells([]), ids=lambda cell: f"{cell.method} {cell.form} {cell.engine} {cell.workers}")
def test_a_cell_is_a_recipe(cell: Cell) -> None:
    recipe = read_flat({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", **cell.keys})
    assert recipe.method.name == cell.method


def test_deepspeed_is_asked_what_it_sends() -> None:
    """Else the bytes of a step would be those of our own few words."""
    configurations = [cell.keys["deepspeed"] for cell in cells([]) if "deepspeed" in cell.keys]
    assert configurations
    for configuration in configurations:
        assert isinstance(configuration, dict)
        assert configuration["comms_logger"] == {"enabled": True, "verbose": False, "prof_all": True}


def test_the_first_steps_are_left_out_and_a_worker_is_the_one_that_sends_most() -> None:
    workers = {"bytes_sent": [100.0, 300.0], "memory_peak_bytes": [1.0, 2.0]}
    lines = [{"loss": 9.0 - step, "tokens_per_second": 50.0 * step, "workers": workers} for step in range(1, 7)]
    assert measured(lines) == Measured(250.0, 300.0, 2.0, 8.0, 3.0)


def test_two_workers_are_set_against_one() -> None:
    one, two = Cell("lora", "", "plain", 1, {}), Cell("lora", "", "plain", 2, {})
    text = table([(one, Measured(100, 0, 2**30, 9, 8)), (two, Measured(150, 4e6, 2**30, 9, 8))], 10_000_000)
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == [
        *("lora", "plain", "2", "150", "1.50x", "4.00", "10.0%", "1.00"),
    ]
