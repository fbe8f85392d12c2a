"""Ratio mode of BAdam against the published optimizer, and what it keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from badam import BlockOptimizerRatio
from tests.storages import live_bytes
from tests.strategies.optim.badam_models import spec
from torch import Tensor, nn

from tunefleet_strategies.optim.block_schedule import NEVER
from tunefleet_strategies.optim.draws import seed_of
from tunefleet_strategies.optim.ratio_adamw import MaskMode, RatioAdamW, active_entries

Shapes = dict[str, tuple[int, ...]]

DISTINCT: Shapes = {"wide": (12, 20), "tall": (21, 13), "three": (5, 6, 7), "vector": (128,)}
MASKS: tuple[MaskMode, ...] = ("adjacent", "scatter")
BOTH = pytest.mark.parametrize("mask_mode", MASKS)


class Weights(nn.Module):
    """Loose parameters, between an embedding and a head that the published optimizer insists on."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.zeros(2, 2))
        self.lm_head = nn.Parameter(torch.zeros(2, 2))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        self.embed.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def backward(self, seed: int) -> dict[str, Tensor]:
        """A backward pass (which runs hooks) whose gradients are drawn from a seed; they are returned as well."""
        generator = torch.Generator().manual_seed(seed)
        gradients = {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in self.trained().items()}
        torch.stack([(gradients[name] * p).sum() for name, p in self.trained().items()]).sum().backward()
        return gradients


def reference(model: Weights, **settings: Any) -> BlockOptimizerRatio:
    return BlockOptimizerRatio(
        [{"params": list(model.trained().values())}], list(model.named_parameters()), lr=1e-2, **settings
    )


def ours(
    model: Weights, *, ratio: float, interval: int, mask_mode: MaskMode = "adjacent", eps: float = 1e-8, **more: Any
) -> RatioAdamW:
    groups = [{"params": list(model.trained().values()), "lr": 1e-2, "weight_decay": more.pop("decay", 0.0)}]
    return RatioAdamW(
        groups, model.trained(), spec(eps=eps, seed=11), ratio=ratio, interval=interval, mask_mode=mask_mode, **more
    )


def changed(before: dict[str, Tensor], model: Weights) -> dict[str, list[int]]:
    """Flat places of the entries that differ, by parameter."""
    return {name: (p != before[name]).flatten().nonzero().flatten().tolist() for name, p in model.trained().items()}


def values(model: Weights) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.trained().items()}


@BOTH
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("ratio", [0.3, 0.07])
def test_equal_to_the_published_optimizer_over_a_wrap_around(mask_mode: MaskMode, eps: float, ratio: float) -> None:
    """fp32, accumulation 1, no decay, no clipping, the same gradients: 90 updates, K 5."""
    peer, mine = Weights(DISTINCT), Weights(DISTINCT)
    theirs = reference(peer, update_ratio=ratio, switch_every=5, mask_mode=mask_mode, eps=eps)
    optimizer = ours(mine, ratio=ratio, interval=5, mask_mode=mask_mode, eps=eps)
    for name, parameter in peer.trained().items():
        theirs.sparse_dict[parameter]["seed"] = seed_of(*optimizer.permutation_key(name))
    for number in range(90):
        for model, one in ((peer, theirs), (mine, optimizer)):
            for group in one.param_groups:
                group["lr"] = 1e-2 * (1 - number / 90)
            model.backward(number)
            one.step()
            one.zero_grad(set_to_none=True)
        for name, parameter in mine.trained().items():
            expected = peer.get_parameter(name)
            distance = (parameter - expected).detach().abs().max()
            assert float(distance) <= 1e-6 * float(expected.detach().abs().max()), (number, name)
    if ratio == 0.3:
        assert 90 // 5 * int(0.3 * 128) > 128, "the window never wrapped around"


def test_its_spread_mask_is_not_that_of_its_moments_where_shapes_are_equal() -> None:
    def entries(optimizer: torch.optim.Optimizer, model: Weights) -> list[dict[str, list[int]]]:
        seen = []
        for number in range(3):
            before = values(model)
            model.backward(number)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(changed(before, model))
        return seen

    equal: Shapes = {"a": (12, 20), "b": (12, 20)}
    torch.manual_seed(0)
    peer = Weights(equal)
    theirs = entries(reference(peer, update_ratio=0.1, switch_every=3, mask_mode="scatter"), peer)
    assert theirs[0] == theirs[1]
    assert theirs[2] != theirs[1], "its third update has the moments of the first two"
    mine = Weights(equal)
    own = entries(ours(mine, ratio=0.1, interval=3, mask_mode="scatter"), mine)
    assert own[0] == own[1] == own[2]
    assert own[0]["a"] != own[0]["b"]


def test_its_window_runs_away_under_accumulation() -> None:
    def first_changed(optimizer: torch.optim.Optimizer, model: Weights) -> list[int]:
        seen = []
        for number in range(4):
            before = values(model)
            model.backward(2 * number)
            model.backward(2 * number + 1)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(changed(before, model)["only"][0])
        return seen

    peer, mine = Weights({"only": (20, 20)}), Weights({"only": (20, 20)})
    assert first_changed(reference(peer, update_ratio=0.1, switch_every=2), peer) == [0, 40, 80, 120]
    assert first_changed(ours(mine, ratio=0.1, interval=2), mine) == [0, 0, 40, 40]


def test_its_threshold_for_small_parameters_does_nothing() -> None:
    small: Shapes = {"norm": (60,)}
    peer, mine = Weights(small), Weights(small)
    for model, optimizer, count in (
        (peer, reference(peer, update_ratio=0.1, preserve_threshold=100), 6),
        (mine, ours(mine, ratio=0.1, interval=5), 60),
    ):
        before = values(model)
        model.backward(0)
        optimizer.step()
        assert len(changed(before, model)["norm"]) == count


def test_it_fails_without_a_head_of_its_own() -> None:
    model = Weights(DISTINCT)
    tied = [(name, p) for name, p in model.named_parameters() if name != "lm_head"]
    with pytest.raises(AttributeError, match="requires_grad_"):
        BlockOptimizerRatio([{"params": list(model.trained().values())}], tied)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_window_gets_k_updates_and_nothing_else_moves(mask_mode: MaskMode, dtype: torch.dtype) -> None:
    model = Weights({"matrix": (20, 10), "small": (50,)}, dtype)
    optimizer = ours(model, ratio=0.3, interval=3, mask_mode=mask_mode, decay=0.5)
    visits: list[set[int]] = []
    for number in range(12):
        before = values(model)
        model.backward(number)
        optimizer.step()
        optimizer.zero_grad()
        moved = changed(before, model)
        if number % 3 == 0:
            visits.append(set())
        visits[-1] |= set(moved["matrix"])
        assert len(visits[-1]) <= 60
        assert len(moved["small"]) > 30
    assert all(len(visit) > 55 for visit in visits)  # a rounded update may move nothing in bf16
    assert visits[0].isdisjoint(visits[1])
    assert len(visits[0] | visits[1] | visits[2] | visits[3]) > 190
    if mask_mode == "adjacent":
        assert visits[0] <= set(range(60))
        assert visits[3] <= set(range(180, 200)) | set(range(40))


@pytest.mark.parametrize(
    ("entries", "ratio", "active"), [(99, 0.05, 99), (100, 0.05, 5), (199, 0.001, 1), (200, 1, 200)]
)
def test_how_many_entries_are_active(entries: int, ratio: float, active: int) -> None:
    assert active_entries(entries, ratio) == active


@BOTH
def test_the_norm_is_that_of_the_active_entries(mask_mode: MaskMode) -> None:
    model = Weights(DISTINCT)
    optimizer = ours(model, ratio=0.2, interval=3, mask_mode=mask_mode)
    gradients = model.backward(5)
    before = values(model)
    norm = optimizer.gradient_norm()
    optimizer.step()
    active = [gradients[name].flatten()[places] for name, places in changed(before, model).items()]
    assert float(norm) == pytest.approx(float(torch.cat(active).norm()), rel=1e-6)


@BOTH
def test_decay_touches_active_entries_only_and_comes_first(mask_mode: MaskMode) -> None:
    model, plain = Weights(DISTINCT), Weights(DISTINCT)
    start = values(model)
    optimizer = ours(model, ratio=0.2, interval=3, mask_mode=mask_mode, decay=0.5)
    without = ours(plain, ratio=0.2, interval=3, mask_mode=mask_mode)
    for one, its in ((model, optimizer), (plain, without)):
        one.backward(3)
        its.step()
    for name, places in changed(start, plain).items():
        difference = (model.get_parameter(name) - plain.get_parameter(name)).detach().flatten()
        expected = torch.zeros_like(difference)
        expected[places] = -1e-2 * 0.5 * start[name].flatten()[places]
        torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-6)


@BOTH
@pytest.mark.parametrize(("dtype", "per_entry"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_bytes_of_state_by_hand(mask_mode: MaskMode, dtype: torch.dtype, per_entry: int) -> None:
    model = Weights({"matrix": (30, 20), "vector": (128,), "small": (50,)}, dtype)
    optimizer = ours(model, ratio=0.05, interval=7, mask_mode=mask_mode)
    for number in range(2):
        model.backward(number)
        optimizer.gradient_norm()
        optimizer.step()
        optimizer.zero_grad()
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert live_bytes(tensors) == per_entry * (30 + 6 + 50)
    places = [optimizer.window(p).index for p in model.trained().values()]
    spread = live_bytes([index for index in places if index is not None])
    assert spread == (4 * (30 + 6) if mask_mode == "scatter" else 0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_and_loaded_at_any_update_is_bit_identical(
    mask_mode: MaskMode, dtype: torch.dtype, tmp_path: Path
) -> None:
    def begin() -> tuple[Weights, RatioAdamW]:
        model = Weights(DISTINCT, dtype)
        return model, ours(model, ratio=0.4, interval=2, mask_mode=mask_mode, decay=0.1)

    model, optimizer = begin()
    for number in range(12):
        torch.save([copy.deepcopy(model.state_dict()), optimizer.state_dict()], tmp_path / f"{number}.pt")
        model.backward(number)
        optimizer.step()
        optimizer.zero_grad()
    for stop in range(12):
        again, other = begin()
        weights, state = torch.load(tmp_path / f"{stop}.pt", weights_only=True)
        again.load_state_dict(weights)
        other.load_state_dict(state)
        for tensors in state["state"].values():
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        for number in range(stop, 12):
            again.backward(number)
            other.step()
            other.zero_grad()
        for name, parameter in model.trained().items():
            assert torch.equal(parameter, again.get_parameter(name)), (stop, name)


def test_a_state_of_other_windows_is_refused() -> None:
    saved = ours(Weights(DISTINCT), ratio=0.4, interval=2).state_dict()
    with pytest.raises(ValueError, match="saved under"):
        ours(Weights(DISTINCT), ratio=0.3, interval=2).load_state_dict(saved)


def test_never_stays_on_the_first_window() -> None:
    model = Weights({"matrix": (20, 10)})
    optimizer = ours(model, ratio=0.3, interval=NEVER)
    start = values(model)
    for number in range(8):
        model.backward(number)
        optimizer.step()
        optimizer.zero_grad()
    assert changed(start, model)["matrix"] == list(range(60))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = Weights(DISTINCT)
    optimizer = ours(model, ratio=0.3, interval=2, mask_mode="scatter")
    for number in range(5):
        model.backward(number)
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_says_where_its_windows_are() -> None:
    model = Weights({"matrix": (20, 10)})
    optimizer = ours(model, ratio=0.3, interval=2, verbose=2)
    for number in range(7):
        model.backward(number)
        optimizer.step()
    told = optimizer.messages()
    assert [text.partition(":")[0] for text in told] == [f"Updates {n} to {n + 1}" for n in (1, 3, 5, 7)]
    assert told[1].endswith("visit 1: matrix 60:120.")
    assert told[3].endswith("visit 3: matrix 180:200 and 0:40.")
    for verbose, count in ((1, 1), (0, 0)):
        other = ours(model, ratio=0.3, interval=2, verbose=verbose)
        other.step()
        briefly = other.messages()
        assert len(briefly) == count
        assert all("matrix" not in text for text in briefly)
