"""Checkpoints keep every dtype and stride, say what is wrong with them, and survive another number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.tiny import PURE, start
from torch import nn

from tunefleet.errors import Refused
from tunefleet.training.checkpoint import RunState, fingerprints, load, save
from tunefleet.training.engines.plain import PlainEngine
from tunefleet.training.progress import Progress
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora


def bf16_state(value: float) -> RunState:
    """A bf16 parameter whose optimizer keeps an fp32 master, fp32 column-major basis and a large integer."""
    model = nn.Linear(3, 4, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.full((4, 3), value / 3),
        "exp_avg_sq": torch.full((4, 3), value / 7),
        "master": torch.full((4, 3), value + 1e-5),
        "basis": torch.arange(12.0).reshape(3, 4).t(),
        "seen": torch.tensor(100001),
    }
    return RunState(PlainEngine(model, optimizer, PURE, max_grad_norm=1.0), frozenset({"weight"}))


def test_optimizer_state_keeps_its_dtypes_and_strides(tmp_path: Path) -> None:
    """torch's own `load_state_dict` makes bf16 of the fp32 state of a bf16 parameter."""
    saved = bf16_state(0.3)
    save(tmp_path, saved, Progress(step=3))
    fresh = bf16_state(0.7)
    assert load(tmp_path, fresh).progress == Progress(step=3)
    before, after = (next(iter(state.optimizer.state.values())) for state in (saved, fresh))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert after[name].stride() == value.stride(), name
        assert torch.equal(after[name], value), name
    assert fingerprints(fresh) == fingerprints(saved)


def test_fingerprints_see_every_part() -> None:
    state = bf16_state(0.3)
    before = fingerprints(state)
    assert fingerprints(state) == before
    torch.rand(1)
    drawn = fingerprints(state)
    assert {key for key in before if before[key] != drawn[key]} == {"random"}
    next(iter(state.optimizer.state.values()))["seen"] += 1
    assert fingerprints(state)["optimizer"] != before["optimizer"]
    state.model.get_parameter("weight").data[0, 0] += 1
    assert fingerprints(state)["weights"] != before["weights"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, start(Full(), "llama").state, Progress())
    with pytest.raises(Refused, match="does not belong to this run"):
        load(tmp_path, start(Full(), "gpt2").state)


def test_another_rank_of_the_same_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, start(Lora(lora_rank=4), "llama").state, Progress())
    with pytest.raises(Refused, match="another shape"):
        load(tmp_path, start(Lora(lora_rank=8), "llama").state)


def test_another_number_of_workers_continues_with_a_notice(tmp_path: Path) -> None:
    run = start(Full(), "llama")
    save(tmp_path, run.state, Progress(step=1))
    random = load_file(tmp_path / "random.safetensors")
    save_file(random | {"rank1": random["rank0"].clone()}, tmp_path / "random.safetensors")
    loaded = load(tmp_path, start(Full(), "llama").state)
    assert len(loaded.notices) == 1
    assert "2 workers" in loaded.notices[0]


def test_only_what_trains_is_saved(tmp_path: Path) -> None:
    run = start(Lora(lora_rank=4), "llama")
    save(tmp_path, run.state, Progress())
    names = {name for name in load_file(tmp_path / "weights.safetensors") if not name.startswith("buffer:")}
    assert names == {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in names)
