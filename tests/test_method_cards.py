"""The pages on GaLore and BAdam: every argument with its default, and bytes that are those of real runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic_core import PydanticUndefined
from tests import by_hand
from tests.storages import live_bytes
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.contract import AttachContext, OptimizerSpec, Precision, Strategy
from tunefleet_strategies.full import Full
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.optim.ratio_adamw import RatioAdamW

CARDS = Path(__file__).resolve().parents[1] / "docs" / "methods"
QUICKSTART = by_hand.Llama(vocabulary=4096, hidden=192, intermediate=512, layers=4, key_value=96)
LARGE = by_hand.Llama(vocabulary=128_256, hidden=4096, intermediate=14_336, layers=32, key_value=1024)
FORMATS = {
    2: Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    4: Precision(torch.float32, torch.float32, torch.float32),
}

Row = tuple[str, Strategy, Callable[[by_hand.Llama, int, int], tuple[int, int]]]
"""What a line is called, the method that it is about, and the bytes of its gradients and state at a rank."""


def layers(model: by_hand.Llama) -> int:
    return model.layers * sum(model.layer())


ADAMW: Row = ("AdamW", Full(), lambda model, q, _: (q * model.total(), by_hand.full(model, q)))
ROWS: dict[str, list[Row]] = {
    "galore": [
        ADAMW,
        ("GaLore", GaLore(galore_rank=32), lambda m, q, r: (q * m.total(), by_hand.galore(m, q, r))),
        (
            "GaLore, layerwise",
            GaLore(galore_rank=32, galore_layerwise=True),
            lambda m, q, r: (q * m.vocabulary * m.hidden, by_hand.galore(m, q, r)),
        ),
    ],
    "badam": [
        ADAMW,
        ("BAdam, layer", BAdam(), lambda m, q, _: (q * sum(m.layer()), by_hand.badam_layer(sum(m.layer()), q))),
        ("BAdam, ratio", BAdam(badam_mode="ratio"), lambda m, q, _: (q * layers(m), by_hand.badam_ratio(m, q, 0.05))),
        (
            "BAdam, ratio, scatter",
            BAdam(badam_mode="ratio", badam_mask_mode="scatter"),
            lambda m, q, _: (q * layers(m), by_hand.badam_ratio(m, q, 0.05, scatter=True)),
        ),
    ],
}


def page(name: str) -> str:
    return (CARDS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", [GaLore, BAdam])
def test_every_argument_stands_on_its_page_with_its_default(method: type[Strategy]) -> None:
    rows = [line.split(" | ") for line in page(method.name).splitlines() if line.startswith("| `")]
    told: dict[str, str] = {}
    for row in rows:  # the first table is the one of the arguments
        told.setdefault(row[0].strip("| `"), row[1].strip("`"))
    for key, field in method.model_fields.items():
        default = field.default
        assert default is not PydanticUndefined
        words = ", ".join(default) if isinstance(default, tuple) else str(default)
        assert told[key] == ("unset" if default is None else words.lower() if isinstance(default, bool) else words)


@pytest.mark.parametrize("q", FORMATS)
@pytest.mark.parametrize("name", ROWS)
def test_the_bytes_on_the_page_are_worked_out_from_shapes(name: str, q: int) -> None:
    text = page(name)
    for model, rank, unit in ((QUICKSTART, 32, 0), (LARGE, 128, 30)):
        for label, _, count in ROWS[name]:
            weights, (gradients, state) = q * model.total(), count(model, q, rank)
            sizes = (weights, gradients, state, weights + gradients + state)
            shown = [f"{size / 2**unit:,.2f}" if unit else f"{size:,}" for size in sizes]
            line = f"| {label} | {' | '.join(shown)} {'GiB' if unit else 'bytes'} |"
            assert line in text, line


@pytest.mark.parametrize("q", FORMATS)
@pytest.mark.parametrize(("name", "number"), [(name, number) for name in ROWS for number in range(len(ROWS[name]))])
def test_the_bytes_of_the_quickstarts_model_are_those_that_live(name: str, number: int, q: int) -> None:
    _, strategy, count = ROWS[name][number]
    model = strategy.attach(quickstart_model(), AttachContext(FORMATS[q]))
    optimizer = strategy.optimizer(model, OptimizerSpec("adamw_torch", 1e-3))
    gradients, state = count(QUICKSTART, q, 32)
    assert live_bytes(model.parameters()) == q * QUICKSTART.total()
    ids = torch.arange(3, 51).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    if not (isinstance(strategy, GaLore) and strategy.galore_layerwise):
        assert live_bytes(p.grad for p in model.parameters() if p.grad is not None) == gradients
    optimizer.step()
    kept = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    if isinstance(optimizer, RatioAdamW):
        places = [optimizer.window(p).index for p in model.parameters() if p.requires_grad]
        kept += [index for index in places if index is not None]
    assert live_bytes(kept) == state


def quickstart_model() -> nn.Module:
    """A model of the quickstart's shape (jobs/prepare_quickstart.py)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=QUICKSTART.vocabulary,
            hidden_size=QUICKSTART.hidden,
            intermediate_size=QUICKSTART.intermediate,
            num_hidden_layers=QUICKSTART.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
