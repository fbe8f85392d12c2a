"""Layer mode of BAdam against the published optimizer, and what it keeps."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from badam import BlockOptimizer
from tests.storages import live_bytes
from tests.strategies.optim.badam_models import backward, batches, layer_blocks, llama, one_group, spec
from torch import nn

from tunefleet_strategies.optim.block_adamw import BlockAdamW
from tunefleet_strategies.optim.block_schedule import BlockSchedule, SwitchMode


@pytest.fixture(autouse=True)
def small_heap() -> Iterator[None]:
    """The published optimizer collects garbage at every switch, which takes long with many modules loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


FORMATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@dataclass(frozen=True)
class Told(BlockSchedule):
    """A schedule whose random rounds are known beforehand."""

    rounds: tuple[tuple[int, ...], ...] = ()

    def order(self, number: int) -> tuple[int, ...]:
        return self.rounds[number]


def reference(model: nn.Module, decay: float = 0.0, **settings: Any) -> BlockOptimizer:
    """The published optimizer around the fused kernel. Its base optimizer's default decay wins over that of groups."""
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay, fused=True)
    return published(base, model, **settings)


def published(base: torch.optim.Optimizer, model: nn.Module, **settings: Any) -> BlockOptimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it expects half-precision weights
        return BlockOptimizer(base, list(model.named_parameters()), verbose=0, **settings)


def ours(model: Any, schedule: BlockSchedule, decay: float = 0.0, verbose: int = 0) -> BlockAdamW:
    blocks = layer_blocks(model)
    model.requires_grad_(False)  # what stands outside the blocks is `attach`'s to freeze
    return BlockAdamW(one_group(blocks, decay), blocks, schedule, spec(), verbose=verbose)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def random_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def trains(model: nn.Module) -> set[str]:
    """Labels of the layers that require a gradient."""
    return {".".join(name.split(".")[:3]) for name, p in model.named_parameters() if p.requires_grad}


@FORMATS
@pytest.mark.parametrize(
    ("mode", "start"),
    [
        ("ascending", None),
        ("ascending", 1),
        ("descending", None),
        ("descending", 0),
        ("fixed", 1),
        ("random", None),
    ],
)
def test_equal_bit_for_bit_to_the_published_optimizer(dtype: torch.dtype, mode: SwitchMode, start: int | None) -> None:
    """42 updates, K 5, falling rate, decay on, one sequence of gradients for both."""
    interval, updates = 5, 42
    peer, mine = llama(dtype=dtype), llama(dtype=dtype)
    torch.manual_seed(7)  # its random order comes from the global state: drawn once here, and again by it
    rounds = tuple(tuple(reversed(torch.randperm(3).tolist())) for _ in range(5))
    torch.manual_seed(7)
    theirs = reference(peer, decay=0.1, switch_mode=mode, switch_block_every=interval, start_block=start)
    theirs.global_step = -1  # else its first block gets K - 1 updates
    optimizer = ours(mine, Told(3, interval, mode, start, rounds=rounds), decay=0.1)
    seen = []
    for number in range(updates):
        assert trains(mine) == trains(peer)
        seen.append(trains(mine).pop())
        for model, one in ((peer, theirs), (mine, optimizer)):
            set_rate(one, 1e-2 * (1 - number / updates))
            random_gradients(model, number)
            one.step()
            one.zero_grad(set_to_none=True)
        for name, parameter in mine.named_parameters():
            assert torch.equal(parameter, peer.get_parameter(name)), (number, name)
    assert len(set(seen)) == (1 if mode == "fixed" else 3)


@pytest.mark.parametrize("mode", ["ascending", "random"])
def test_an_engine_that_steps_itself_walks_the_same_way(mode: SwitchMode) -> None:
    """Turn by turn with plain optimizers: equal bit for bit, moments begun anew, and from any update on."""
    stepped, driven = llama(), llama()
    schedule = BlockSchedule(3, 4, mode, seed=3)
    whole, walk = ours(stepped, schedule, decay=0.1), ours(driven, schedule, decay=0.1)
    turn = walk.turn_optimizer()
    for number in range(20):
        assert trains(driven) == trains(stepped)
        assert {id(p) for group in turn.param_groups for p in group["params"]} == {
            id(p) for p in driven.parameters() if p.requires_grad
        }
        for model, one in ((stepped, whole), (driven, turn)):
            random_gradients(model, number)
            one.step()
            one.zero_grad(set_to_none=True)
        ended = walk.advance()
        assert ended == ((number + 1) % 4 == 0)
        if ended:
            turn = walk.turn_optimizer()
        for name, parameter in driven.named_parameters():
            assert torch.equal(parameter, stepped.get_parameter(name)), (number, name)
    assert walk.updates == whole.updates == 20
    walk.stand_at(6)
    assert trains(driven) == {walk.blocks[schedule.block(6)].label}


def test_its_first_block_gets_one_update_less() -> None:
    model = llama()
    theirs = reference(model, switch_mode="ascending", switch_block_every=4)
    active = []
    for ids in batches(12):
        active.append(trains(model).pop()[-1])
        backward(model, ids)
        theirs.step()
    assert "".join(active) == "000111122220"


def test_its_interval_of_minus_one_switches_after_every_update() -> None:
    model = llama()
    theirs = reference(model, switch_mode="ascending", switch_block_every=-1)
    active = []
    for ids in batches(4):
        active.append(trains(model).pop()[-1])
        backward(model, ids)
        theirs.step()
    assert "".join(active) == "0120"


def test_its_head_block_alone_trains_the_embedding_too() -> None:
    model = llama()
    reference(model, switch_mode="fixed", start_block=3, include_lm_head=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_its_defaults_replace_the_decay_of_groups() -> None:
    model = llama()
    base = torch.optim.AdamW([{"params": list(model.parameters()), "weight_decay": 0.3}], weight_decay=0.02)
    theirs = published(base, model, switch_mode="ascending")
    assert [group["weight_decay"] for group in theirs.base_optimizer.param_groups] == [0.02, 0.02]


def test_its_state_goes_on_with_another_block_and_does_not_say_so() -> None:
    model = llama()
    theirs = reference(model, switch_mode="ascending", switch_block_every=3)
    for ids in batches(4):
        backward(model, ids)
        theirs.step()
    assert trains(model) == {"model.layers.1"}
    again = reference(other := llama(), switch_mode="ascending", switch_block_every=3)
    again.load_state_dict(theirs.state_dict())
    assert trains(other) == {"model.layers.0"}
    assert all(float(state["step"]) > 0 for state in again.base_optimizer.state_dict()["state"].values())


@FORMATS
def test_only_the_active_block_has_gradients_and_state(dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    optimizer = ours(model, BlockSchedule(3, 2, "ascending"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for updates, ids in enumerate(batches(6)):
        label = f"model.layers.{updates // 2}."
        backward(model, ids)
        assert all((p.grad is not None) == name.startswith(label) for name, p in model.named_parameters())
        optimizer.step()
        kept = {name for name, p in model.named_parameters() if p in optimizer.state}
        if updates % 2 == 1:  # the visit is over: its state is gone, and so are its gradients
            assert kept == set()
            assert all(p.grad is None for name, p in model.named_parameters())
        else:
            assert kept == {name for name, _ in model.named_parameters() if name.startswith(label)}
            optimizer.zero_grad(set_to_none=True)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if not name.startswith("model.layers.")} == set()
    matrices = {name for name in before if name.startswith("model.layers.") and "norm" not in name}
    assert matrices <= moved


@pytest.mark.parametrize(("dtype", "per_entry"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_bytes_of_state_by_hand(dtype: torch.dtype, per_entry: int) -> None:
    model = llama(dtype=dtype)
    optimizer = ours(model, BlockSchedule(3, 5, "ascending"))
    backward(model, next(batches(1)))
    optimizer.step()
    # q and o 32 x 32, k and v 16 x 32 (two of four heads), gate, up and down 48 x 32, two norms of 32.
    entries = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert live_bytes(tensors) == per_entry * entries
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert live_bytes(gradients) == dtype.itemsize * entries


def test_the_master_keeps_what_bf16_weights_would_lose_and_is_read_again_at_each_visit() -> None:
    model = llama(dtype=torch.bfloat16)
    optimizer = ours(model, BlockSchedule(3, 4, "fixed", 0))
    set_rate(optimizer, 1e-6)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    start = weight.detach().clone()
    for number, ids in enumerate(batches(7)):
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
        if number == 2:
            master = optimizer.state[weight]["master"]
            assert (master != start.float()).float().mean() > 0.9
            assert (weight != start).float().mean() < 0.1
            assert torch.equal(weight, master.bfloat16())
        if number == 3:
            rounded = weight.detach().float().clone()
    # Three updates of at most 1e-6 from the rounded weights: what was lost at the end of the first visit stays lost.
    assert float((optimizer.state[weight]["master"] - rounded).abs().max()) < 4e-6


@FORMATS
@pytest.mark.parametrize("stop", range(1, 7))
def test_saved_and_loaded_at_any_update_is_bit_identical(dtype: torch.dtype, stop: int, tmp_path: Path) -> None:
    schedule = BlockSchedule(3, 2, "random", seed=3)
    model = llama(dtype=dtype)
    optimizer = ours(model, schedule, decay=0.1)
    saved: dict[str, torch.Tensor] = {}
    for number, ids in enumerate(batches(12)):
        if number == stop:
            saved = copy.deepcopy(model.state_dict())
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
    again = llama(dtype=dtype)
    other = ours(again, schedule, decay=0.1)
    again.load_state_dict(saved)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for number, ids in enumerate(batches(12)):
        if number >= stop:
            backward(again, ids)
            other.step()
            other.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_loading_keeps_formats_that_torch_would_cast(tmp_path: Path) -> None:
    """fp32 master and moments, and an integer that bf16 cannot hold, on bf16 parameters."""
    model = llama(dtype=torch.bfloat16)
    optimizer = ours(model, BlockSchedule(3, 200_000, "ascending"))
    backward(model, next(batches(1)))
    optimizer.step()
    optimizer.updates = 100_001
    saved = optimizer.state_dict()
    torch.save(saved, tmp_path / "state.pt")
    other = ours(llama(dtype=torch.bfloat16), BlockSchedule(3, 200_000, "ascending"))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    loaded = other.state_dict()
    assert loaded["updates"] == 100_001
    assert loaded["state"].keys() == saved["state"].keys()
    for name, state in saved["state"].items():
        assert state.keys() == {"exp_avg", "exp_avg_sq", "master"}
        for key, tensor in state.items():
            assert loaded["state"][name][key].dtype == tensor.dtype == torch.float32
            assert loaded["state"][name][key].stride() == tensor.stride()
            assert torch.equal(loaded["state"][name][key], tensor), (name, key)
    # What this is about: torch's own loading rounds the same state.
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
    state = {0: {"step": torch.tensor(1.0), "exp_avg": torch.full((2,), 0.1), "exp_avg_sq": torch.full((2,), 0.1)}}
    plain.load_state_dict({"state": state, "param_groups": plain.state_dict()["param_groups"]})
    assert next(iter(plain.state.values()))["exp_avg"].dtype == torch.bfloat16


def test_a_state_of_another_schedule_or_model_is_refused() -> None:
    saved = ours(llama(), BlockSchedule(3, 2, "ascending")).state_dict()
    with pytest.raises(ValueError, match="saved under"):
        ours(llama(), BlockSchedule(3, 3, "ascending")).load_state_dict(saved)
    shuffled = {**saved, "param_groups": [{**saved["param_groups"][0], "params": ["other"]}]}
    with pytest.raises(ValueError, match="other parameters"):
        ours(llama(), BlockSchedule(3, 2, "ascending")).load_state_dict(shuffled)


def test_a_missing_gradient_counts_as_zero() -> None:
    """An expert that no token chose still decays, on one worker as on two."""
    model, twin = llama(), llama()
    optimizers = [ours(one, BlockSchedule(3, 9, "ascending"), decay=0.5) for one in (model, twin)]
    ids = next(batches(1))
    backward(model, ids)
    backward(twin, ids)
    name = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(name).grad = None
    twin.get_parameter(name).grad = torch.zeros_like(twin.get_parameter(name))
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(model.get_parameter(name), twin.get_parameter(name))
    assert not torch.equal(model.get_parameter(name), llama().get_parameter(name))


@pytest.mark.parametrize(("verbose", "said"), [(0, 0), (1, 3), (2, 3)])
def test_it_says_what_trains_when_that_changes(verbose: int, said: int) -> None:
    model = llama()
    optimizer = ours(model, BlockSchedule(3, 2, "ascending"), verbose=verbose)
    messages = []
    for ids in batches(5):
        backward(model, ids)
        optimizer.step()
        messages.append(optimizer.messages())
    told = [text for texts in messages for text in texts]
    assert len(told) == said
    if verbose:
        assert told[0].startswith("Updates 1 to 2: badam trains block 0 (model.layers.0) of 3")
        assert told[1].startswith("Updates 3 to 4: badam trains block 1")
        assert [len(texts) for texts in messages] == [1, 0, 1, 0, 1]  # told with the first update of a visit
        assert all(("model.layers.0.mlp.up_proj.weight" in text) == (verbose == 2) for text in told[:1])


def test_it_says_the_order_of_a_random_round() -> None:
    schedule = BlockSchedule(3, 1, "random", seed=2)
    optimizer = ours(llama(), schedule, verbose=1)
    optimizer.step()
    (text,) = optimizer.messages()
    assert text.endswith(f"the order of this round is {', '.join(map(str, schedule.order(0)))}.")
