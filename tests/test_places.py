"""Where each method runs: one table, read from the traits, that the plan obeys and the tests cover."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.contract.variants import FSDP2, SHARED, VARIANTS
from tests.worker.zero_cells import METHODS, QUICK, SLOW

from tunefleet.places import SITES, Cell, Line, matrix, matrix_markdown, refusal
from tunefleet.recipe.read import read_flat
from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.contract import Strategy
from tunefleet_strategies.full import Full
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.registry import methods

ROOT = Path(__file__).resolve().parents[1]
LINES = list(matrix())
RECIPE: dict[str, object] = {
    "model_name_or_path": "base",
    "dataset": "rows.jsonl",
    "output_dir": "out",
    "finetuning_type": "full",
}
RUN_ELSEWHERE = {
    ("galore", "optimizer_backend: upstream"),
    ("badam", "optimizer_backend: upstream"),
    ("badam", "badam_mode: ratio and optimizer_backend: upstream"),
}
"""Forms whose state cannot be saved: tests/worker/test_galore_runs.py and test_badam_runs.py run them."""


def cells(method: Strategy) -> dict[str, Cell]:
    return {site.label: refusal(method, site) for site in SITES}


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "places.md").read_text(encoding="utf-8")
    assert page == matrix_markdown(), "run: tunefleet methods --matrix --markdown > docs/places.md"


def test_every_method_and_form_has_a_line() -> None:
    expected = [(method.name, form) for method in methods() for form in ("", *method.forms)]
    assert [(line.method, line.form) for line in LINES] == expected


def test_forms_differ_in_their_traits() -> None:
    for method in methods():
        traits = [method().traits(), *(method.model_validate(settings).traits() for settings in method.forms.values())]
        assert all(one != other for number, one in enumerate(traits) for other in traits[:number])


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.method} {line.form}".strip())
def test_every_yes_is_run_by_a_test(line: Line) -> None:
    """The contract tests run the variants: all of them on one worker, SHARED on two, FSDP2 on two that share out."""
    everywhere = {cell.place for cell in line.cells if cell.refusal is None}
    said = everywhere & {"1 worker", "data parallel", "FSDP2"}
    assert everywhere - said == run_under_zero(line)
    if (line.method, line.form) in RUN_ELSEWHERE:
        assert said == {"1 worker"}
        return
    method = next(method for method in methods() if method.name == line.method)
    strategy = method.model_validate(method.forms.get(line.form, {}))
    alike = {name for name, variant in VARIANTS.items() if (variant.name, variant.traits()) == key(strategy)}
    assert alike
    assert ("data parallel" in said) == bool(alike & {name for name, _ in SHARED})
    assert ("FSDP2" in said) == bool(alike & {name for name, _ in FSDP2})


def run_under_zero(line: Line) -> set[str]:
    """The stages that tests/worker/test_zero.py runs a method at; its forms differ from it by where they do not run."""
    cells = [*QUICK.values(), *SLOW.values()]
    stages = {
        stage for name, stage in cells if not line.form and read_flat(RECIPE | METHODS[name]).method.name == line.method
    }
    return {f"ZeRO-{stage}" for stage in stages}


def key(strategy: Strategy) -> tuple[str, object]:
    return strategy.name, strategy.traits()


def test_the_documented_restrictions_hold() -> None:
    ratio, layerwise = cells(BAdam(badam_mode="ratio")), cells(GaLore(galore_layerwise=True))
    assert ratio["1 worker"].refusal is None
    assert ratio["data parallel"].refusal == "badam with badam_mode: ratio runs on one worker"
    assert layerwise["data parallel"].refusal == "galore with galore_layerwise: true runs on one worker"
    layer = cells(BAdam())
    assert layer["data parallel"].refusal is None
    assert layer["ZeRO-2"].refusal == "badam is sharded by FSDP2 and ZeRO-3 only"
    assert layer["ZeRO-3"].allowed
    assert cells(GaLore())["ZeRO-3"].refusal == "galore does not run where weights or optimizer state are sharded"
    assert all(cell.allowed for cell in cells(Full()).values())
