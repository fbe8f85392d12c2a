"""Which methods there are, and what a recipe's choosing keys mean."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tunefleet_strategies import registry
from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.lora import Lora
from tunefleet_strategies.registry import methods, owners, select, selector_keys

PLUGIN = """
from tunefleet_strategies.full import Full

class Mine(Full):
    name = "{name}"
    summary = "a method from elsewhere"
    selector = {selector}
    mine_rank: int = 3
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lay out a small installed distribution: a module, and metadata that names an entry point."""

    def lay_out(code: str, value: str) -> None:
        # Each module under its own name, so that one test's is not found for another's.
        module = f"elsewhere_{tmp_path.name}"
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / "elsewhere-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tunefleet.strategies]\nmine = {module}:{value}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield lay_out
    for name in [name for name in sys.modules if name.startswith("elsewhere_")]:
        del sys.modules[name]
    registry._plugins.cache_clear()


def test_the_table_is_complete_and_names_are_unique() -> None:
    assert methods() == (Full, Freeze, Lora, GaLore, BAdam)
    assert len({method.name for method in methods()}) == len(methods())


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        ({}, Lora),
        ({"finetuning_type": None}, Lora),
        ({"finetuning_type": "lora", "lora_rank": 4, "use_galore": False}, Lora),
        ({"finetuning_type": "full"}, Full),
        ({"finetuning_type": "full", "use_badam": None}, Full),
        ({"finetuning_type": "full", "use_badam": True}, BAdam),
        ({"finetuning_type": "freeze", "use_galore": False, "use_badam": False}, Freeze),
        ({"finetuning_type": "full", "use_galore": True, "use_badam": False}, GaLore),
    ],
)
def test_select(keys: dict[str, object], method: type) -> None:
    assert select(keys) is method


@pytest.mark.parametrize("switch", ["use_galore", "use_badam"])
@pytest.mark.parametrize("kind", [None, "lora", "freeze"])
def test_an_optimizer_method_without_full_weights_is_refused_with_the_mend(switch: str, kind: str | None) -> None:
    with pytest.raises(StrategyError, match=f"{switch} .*write finetuning_type: full"):
        select({switch: True, "finetuning_type": kind})


def test_two_optimizer_methods_at_once_are_refused() -> None:
    with pytest.raises(StrategyError, match="use_badam and use_galore choose two methods"):
        select({"finetuning_type": "full", "use_galore": True, "use_badam": True})


@pytest.mark.parametrize("keys", [{"finetuning_type": "oft"}, {"finetuning_type": 3}, {"use_galore": "yes"}])
def test_values_that_mean_nothing_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(StrategyError, match=r"choose from full, freeze, lora|write true or false"):
        select(keys)


def test_every_key_says_whose_it_is() -> None:
    assert selector_keys() == {"finetuning_type", "use_galore", "use_badam"}
    assert owners("lora_rank") == ("lora",)
    assert owners("freeze_trainable_layers") == ("freeze",)
    assert owners("galore_rank") == ("galore",)
    assert {*owners("optimizer_backend")} == {"galore", "badam"}
    assert owners("badam_mask_mode") == ("badam",)
    assert owners("lora_rnk") == ()


def test_an_installed_package_adds_a_method(install: Install) -> None:
    install(PLUGIN.format(name="mine", selector={"finetuning_type": "mine"}), "Mine")
    assert [method.name for method in methods()] == ["full", "freeze", "lora", "galore", "badam", "mine"]
    assert select({"finetuning_type": "mine"}).name == "mine"
    assert owners("mine_rank") == ("mine",)
    assert select({}) is Lora


def test_an_installed_package_may_bring_a_switch(install: Install) -> None:
    install(PLUGIN.format(name="mine", selector={"finetuning_type": "full", "use_mine": True}), "Mine")
    assert "use_mine" in selector_keys()
    assert select({"finetuning_type": "full", "use_mine": True}).name == "mine"
    assert select({"finetuning_type": "full"}) is Full


@pytest.mark.parametrize(
    ("code", "value", "reason"),
    [
        ("import nowhere_at_all", "Mine", "cannot be loaded"),
        (PLUGIN.format(name="mine", selector={"finetuning_type": "mine"}), "Missing", "cannot be loaded"),
        ("Mine = 3", "Mine", "is no Strategy class"),
        (PLUGIN.format(name="lora", selector={"finetuning_type": "mine"}), "Mine", "named lora, which is taken"),
        (PLUGIN.format(name="galore", selector={"finetuning_type": "mine"}), "Mine", "named galore, which is taken"),
        (PLUGIN.format(name="mine", selector={"finetuning_type": "full"}), "Mine", "another method answers to"),
        (
            "from tunefleet_strategies.contract import Strategy\nclass Mine(Strategy):\n    name = 'mine'\n",
            "Mine",
            "leaves out summary, selector, attach, export",
        ),
    ],
)
def test_a_broken_package_is_named(install: Install, code: str, value: str, reason: str) -> None:
    install(code, value)
    with pytest.raises(StrategyError, match=reason) as caught:
        methods()
    assert "mine = elsewhere_" in str(caught.value)


def test_reading_the_registry_loads_neither_transformers_nor_peft_nor_the_platform() -> None:
    code = (
        "import sys; from tunefleet_strategies.registry import select; select({}).model_validate({'lora_rank': 4});"
        "print([m for m in ('transformers', 'peft', 'ray', 'tunefleet') if m in sys.modules])"
    )
    roots = str(Path(registry.__file__).parents[1])
    environment = {"PYTHONPATH": roots, "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
