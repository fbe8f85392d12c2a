"""GaLore's own AdamW: what it keeps, when it refreshes, how it goes on after a break, and layer by layer."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from tests.storages import live_bytes
from torch import Tensor, nn

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.optim import galore
from tunefleet_strategies.optim.galore import Behaviour, GaLoreAdamW
from tunefleet_strategies.optim.groups import Group
from tunefleet_strategies.optim.projection import Projection, Refresh

SPEC = OptimizerSpec("adamw_torch", 1e-2, weight_decay=0.1, seed=3)
SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16), "experts": (3, 24, 12), "embedding": (20, 12)}
SHAPES |= {"bias": (12,)}
PROJECTED = ("tall", "wide", "square", "experts")
RANK = 4
FORMATS = [torch.float32, torch.bfloat16]
LAYERWISE = Behaviour(layerwise=True)


class Weights(nn.Module):
    """A matrix of each shape, with a loss whose gradients differ at every weight and every step."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterDict({n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()})
        self.goals = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}

    def backward(self, step: int, names: tuple[str, ...] = tuple(SHAPES)) -> None:
        turned = [torch.roll(self.goals[n], step, -1) * (1 + 0.1 * step) for n in names]
        loss = sum(((self.weights[n] - goal).float() ** 2).sum() for n, goal in zip(names, turned, strict=True))
        assert isinstance(loss, Tensor)
        torch.autograd.backward(0.05 * loss)


def optimizer(
    model: Weights,
    kind: Projection = "std",
    behaviour: Behaviour | None = None,
    interval: int = 3,
    rank: int = RANK,
    spec: OptimizerSpec = SPEC,
) -> GaLoreAdamW:
    how: Group = {"rank": rank, "projection": kind, "update_interval": interval, "scale": 0.5}
    weights = model.weights
    groups: list[Group] = [
        {"params": [weights[name] for name in PROJECTED], **how},
        {"params": [weights["embedding"]]},
        {"params": [weights["bias"]], "weight_decay": 0.0},
    ]
    return GaLoreAdamW(groups, spec, behaviour or Behaviour(refresh="eigh"))


def run(model: Weights, own: GaLoreAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        model.backward(step)
        own.step()
        own.zero_grad(set_to_none=True)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return dict(torch.load(buffer, weights_only=True))


def traces(model: Weights, own: GaLoreAdamW) -> dict[str, tuple[Any, ...]]:
    """Bits, number formats and strides of everything that a resume must bring back."""
    found: dict[str, tuple[Any, ...]] = {}
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for number, entry in own.state_dict()["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{number}/{name}"] = value
            else:
                found[f"{number}/{name}"] = (value,)
    for name, value in tensors.items():
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        found[name] = (value.dtype, value.shape, value.stride(), flat.numpy().tobytes())
    return found


# ---- bytes ----------------------------------------------------------------------------------------------------------


def bytes_by_hand(kind: Projection, basis_bytes: int) -> int:
    """exactness.md A5 written out for the shapes above: rank 4, moments of 4 bytes."""
    right = {"tall": 4 * 12, "wide": 4 * 24, "square": 4 * 16, "experts": 3 * 4 * 12}  # r n
    right_moments = {"tall": 24 * 4, "wide": 12 * 4, "square": 16 * 4, "experts": 3 * 24 * 4}  # m r
    left = {"tall": 24 * 4, "wide": 12 * 4, "square": 16 * 4, "experts": 3 * 24 * 4}  # m r
    left_moments = {"tall": 4 * 12, "wide": 4 * 24, "square": 4 * 16, "experts": 3 * 4 * 12}  # r n
    core = {"tall": 4 * 4, "wide": 4 * 4, "square": 4 * 4, "experts": 3 * 4 * 4}  # r r
    on_the_right: dict[str, tuple[str, ...]] = {
        "std": ("tall", "square", "experts"),
        "reverse_std": ("wide",),
        "right": PROJECTED,
        "left": (),
    }
    total = 2 * 4 * (20 * 12 + 12)  # embedding and bias
    for name in PROJECTED:
        if kind == "full":
            total += basis_bytes * (left[name] + right[name]) + 2 * 4 * core[name]
        elif name in on_the_right[kind]:
            total += basis_bytes * right[name] + 2 * 4 * right_moments[name]
        else:
            total += basis_bytes * left[name] + 2 * 4 * left_moments[name]
    return total


@pytest.mark.parametrize("behaviour", [Behaviour("svd"), Behaviour("eigh"), Behaviour("subspace"), LAYERWISE])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", get_args(Projection))
def test_state_is_what_the_formulas_say(kind: Projection, dtype: torch.dtype, behaviour: Behaviour) -> None:
    model = Weights(dtype)
    own = optimizer(model, kind, behaviour)
    run(model, own, 0, 5)  # the second refresh is behind us
    tensors = [value for entry in own.state.values() for value in entry.values() if isinstance(value, Tensor)]
    assert live_bytes(tensors) == bytes_by_hand(kind, dtype.itemsize)
    assert {t.dtype for entry in own.state.values() for n, t in entry.items() if n.startswith("exp")} == {torch.float32}


def test_at_4096_square_and_rank_128_it_is_5_mib() -> None:
    """The figure of the method card."""
    assert 2 * 128 * 4096 + 8 * 4096 * 128 == 5 * 2**20
    assert 8 * 4096 * 4096 == 128 * 2**20


# ---- resume ---------------------------------------------------------------------------------------------------------

BEHAVIOURS = [
    *(Behaviour(refresh) for refresh in get_args(Refresh)),
    *(Behaviour(refresh, stagger=True) for refresh in get_args(Refresh)),
    *(Behaviour(refresh, layerwise=True) for refresh in get_args(Refresh)),
    Behaviour("subspace", stagger=True, rounding="stochastic", layerwise=True),
]
STEPS = 7


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("kind", get_args(Projection))
def test_a_break_at_any_step_changes_no_bit(kind: Projection, behaviour: Behaviour, dtype: torch.dtype) -> None:
    model = Weights(dtype)
    own = optimizer(model, kind, behaviour)
    kept = []
    for step in range(STEPS):
        kept.append(through_a_file({"weights": model.state_dict(), "optimizer": own.state_dict()}))
        run(model, own, step, step + 1)
    expected = traces(model, own)
    for step in range(1, STEPS):  # refreshes are at 0, 3 and 6, or in between where they are staggered
        again = Weights(dtype)
        again.load_state_dict(kept[step]["weights"])
        resumed = optimizer(again, kind, behaviour)
        resumed.load_state_dict(kept[step]["optimizer"])
        run(again, resumed, step, STEPS)
        assert traces(again, resumed) == expected, step


@pytest.mark.parametrize("dtype", FORMATS)
def test_loaded_state_keeps_number_formats_and_strides(dtype: torch.dtype) -> None:
    model = Weights(dtype)
    own = optimizer(model, "full")
    run(model, own, 0, 2)
    again = optimizer(Weights(dtype), "full")
    again.load_state_dict(through_a_file(own.state_dict()))
    seen = set()
    for entry, other in zip(own.state.values(), again.state.values(), strict=True):
        assert type(other["step"]) is int
        for name, value in entry.items():
            if isinstance(value, Tensor):
                assert (other[name].dtype, other[name].stride()) == (value.dtype, value.stride()), name
                assert torch.equal(other[name], value)
                seen.add((name, value.dtype))
    assert {("exp_avg", torch.float32), ("left", dtype), ("right", dtype)} <= seen


def test_loading_does_not_tie_two_optimizers_together() -> None:
    model, other = Weights(), Weights()
    own, again = optimizer(model), optimizer(other)
    run(model, own, 0, 1)
    again.load_state_dict(own.state_dict())
    before = traces(model, own)
    run(other, again, 1, 3)
    assert traces(model, own) == before


def test_state_of_other_parameters_is_refused() -> None:
    model = Weights()
    own = optimizer(model)
    other = GaLoreAdamW([{"params": [model.weights["bias"]]}], SPEC, Behaviour())
    with pytest.raises(ValueError, match="grouped otherwise"):
        own.load_state_dict(other.state_dict())


# ---- refreshes ------------------------------------------------------------------------------------------------------


def refreshes(behaviour: Behaviour, steps: int, interval: int) -> dict[str, list[int]]:
    """The steps at which each matrix' basis changed."""
    model = Weights()
    own = optimizer(model, "std", behaviour, interval)
    seen: dict[str, list[int]] = {name: [] for name in PROJECTED}
    before: dict[str, Tensor] = {}
    for step in range(steps):
        run(model, own, step, step + 1)
        for name in PROJECTED:
            state = own.state[model.weights[name]]
            basis = next(iter(state[side] for side in ("left", "right") if side in state))
            if name not in before or not torch.equal(before[name], basis):
                seen[name].append(step)
            before[name] = basis.clone()
    return seen


@pytest.mark.parametrize("layerwise", [False, True])
def test_bases_are_refreshed_at_the_first_update_and_then_every_interval(layerwise: bool) -> None:
    assert refreshes(Behaviour(layerwise=layerwise), 10, 4) == {name: [0, 4, 8] for name in PROJECTED}


@pytest.mark.parametrize("layerwise", [False, True])
def test_staggered_refreshes_are_spread_evenly_after_the_first(layerwise: bool) -> None:
    seen = refreshes(Behaviour(stagger=True, layerwise=layerwise), 17, 8)
    assert seen == {"tall": [0, 8, 16], "wide": [0, 6, 14], "square": [0, 4, 12], "experts": [0, 2, 10]}


def test_a_parameter_that_joins_late_has_its_first_refresh_at_its_own_first_update() -> None:
    model = Weights()
    own = optimizer(model, interval=4)
    late = tuple(name for name in SHAPES if name != "tall")
    for step in range(2):
        model.backward(step, late)
        own.step()
        own.zero_grad(set_to_none=True)
    assert "step" not in own.state[model.weights["tall"]]
    run(model, own, 2, 3)
    assert own.state[model.weights["tall"]]["step"] == 1
    assert own.state[model.weights["wide"]]["step"] == 3
    assert "right" in own.state[model.weights["tall"]]


def test_a_fallback_of_subspace_iteration_is_said_once() -> None:
    model = Weights()
    own = optimizer(model, behaviour=Behaviour("subspace"), interval=1)
    for columns in (slice(0, 6), slice(6, 12)):  # the second gradient is one that the first basis is blind to
        assert own.messages() == []
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        tall = model.weights["tall"]
        assert tall.grad is not None
        tall.grad[:, columns] = model.goals["tall"][:, columns]
        own.step()
    assert own.messages() == ["galore_refresh: subspace fell back to the exact basis for 1 of 4 matrices"]
    assert own.messages() == []


def test_how_much_is_updated_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = Weights(), Weights()
    run(whole, optimizer(whole), 0, 4)
    monkeypatch.setattr(galore, "_PIECE_ENTRIES", 300)
    run(cut, optimizer(cut), 0, 4)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, cut.weights[name])


# ---- bf16 -----------------------------------------------------------------------------------------------------------


def test_the_share_of_changed_weights_is_that_of_the_last_update() -> None:
    model = Weights(torch.bfloat16)
    own = optimizer(model)
    assert own.measurements() == {}
    for step in range(2):
        before = {name: weight.detach().clone() for name, weight in model.weights.items()}
        run(model, own, step, step + 1)
    changed = sum(int((weight != before[name]).sum()) for name, weight in model.weights.items())
    entries = sum(weight.numel() for weight in model.weights.values())
    assert own.measurements() == {"weights_changed": changed / entries}
    assert 0.1 < changed / entries < 1.0
    full = Weights()
    own = optimizer(full)
    run(full, own, 0, 1)
    assert own.measurements() == {}


def test_small_updates_are_lost_by_rounding_to_nearest_and_kept_on_average_by_stochastic_rounding() -> None:
    spec = replace(SPEC, learning_rate=1e-4, weight_decay=0.0)
    exact, nearest, stochastic = Weights(), Weights(torch.bfloat16), Weights(torch.bfloat16)
    started = Weights(torch.bfloat16)
    with torch.no_grad():
        for name, weight in exact.weights.items():
            weight.copy_(started.weights[name].float())
    for model, behaviour in (
        (exact, Behaviour()),
        (nearest, Behaviour()),
        (stochastic, Behaviour(rounding="stochastic")),
    ):
        run(model, optimizer(model, behaviour=behaviour, spec=spec), 0, 20)

    def moved(model: Weights) -> Tensor:
        return torch.cat([(w - started.weights[n]).float().flatten() for n, w in model.weights.items()]).detach()

    wanted = moved(exact)
    follows = [float(moved(model) @ wanted / (wanted @ wanted)) for model in (nearest, stochastic)]
    assert follows[0] < 0.5
    assert follows[1] == pytest.approx(1.0, abs=0.15)


def test_the_noise_of_rounding_depends_on_seed_step_and_parameter_alone() -> None:
    def trained(seed: int, disturb: bool = False) -> list[Tensor]:
        model = Weights(torch.bfloat16)
        own = optimizer(model, behaviour=Behaviour(rounding="stochastic"), spec=replace(SPEC, seed=seed))
        for step in range(2):
            if disturb:
                torch.rand(7)
            run(model, own, step, step + 1)
        return [weight.detach() for weight in model.parameters()]

    state = torch.random.get_rng_state()
    first = trained(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, trained(1, disturb=True), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, trained(2), strict=True))


# ---- layerwise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
def test_layerwise_is_the_same_update_and_frees_each_gradient_at_once(dtype: torch.dtype) -> None:
    model, other = Weights(dtype), Weights(dtype)
    own, layerwise = optimizer(model), optimizer(other, behaviour=Behaviour("eigh", layerwise=True))
    assert layerwise.steps_in_backward
    for step in range(5):
        for group in (*own.param_groups, *layerwise.param_groups):
            group["lr"] = 1e-2 / (1 + step)  # one schedule for all
        model.backward(step)
        norm = torch.stack([w.grad.float().norm() for w in model.parameters() if w.grad is not None]).norm()
        own.step()
        own.zero_grad(set_to_none=True)
        other.backward(step)
        assert all(weight.grad is None for weight in other.parameters())
        used = layerwise.gradient_norm()
        assert used is not None
        assert float(used) == pytest.approx(float(norm), rel=1e-5)
        layerwise.step()
        assert own.measurements() == layerwise.measurements()
    for name, weight in model.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def test_only_one_gradient_lives_at_a_time() -> None:
    model = Weights()
    own = optimizer(model, behaviour=LAYERWISE)
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(weight.grad is not None for weight in model.parameters()))

    for weight in model.parameters():
        weight.register_hook(count)
    run(model, own, 0, 2)
    assert most == 0  # before a gradient is stored, none of the others is left


def test_what_the_backward_pass_does_not_reach_counts_as_zero() -> None:
    model, other = Weights(), Weights()
    own, layerwise = optimizer(model), optimizer(other, behaviour=Behaviour("eigh", layerwise=True))
    reached = tuple(name for name in SHAPES if name != "embedding")
    for step in range(3):
        model.backward(step, reached)
        model.weights["embedding"].grad = torch.zeros_like(model.weights["embedding"])
        own.step()
        own.zero_grad(set_to_none=True)
        other.backward(step, reached)
        layerwise.step()
    for name, weight in model.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def test_nothing_to_learn_from_has_norm_zero() -> None:
    own = optimizer(Weights(), behaviour=LAYERWISE)
    norm = own.gradient_norm()
    assert norm is not None
    assert float(norm) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 1])
def test_a_gradient_that_is_not_finite_is_told_by_its_norm(bad: float, step: int) -> None:
    """Also where it should become a basis, which it cannot: that parameter and its basis stay."""
    model = Weights()
    own = optimizer(model, behaviour=Behaviour("svd", layerwise=True))
    run(model, own, 0, step)
    before = {name: weight.detach().clone() for name, weight in model.weights.items()}
    model.goals["tall"][0, 0] = bad
    model.backward(step)
    norm = own.gradient_norm()
    assert norm is not None
    assert not float(norm) < float("inf")
    if step == 0:
        assert torch.equal(model.weights["tall"], before["tall"])
        assert "right" not in own.state[model.weights["tall"]]


def test_a_second_backward_pass_is_refused_with_the_mend() -> None:
    model = Weights()
    optimizer(model, behaviour=LAYERWISE)
    model.backward(0)
    with pytest.raises(StrategyError, match="gradient_accumulation_steps: 1"):
        model.backward(1)


def test_layerwise_state_is_saved_and_counts_updates() -> None:
    model = Weights()
    own = optimizer(model, behaviour=LAYERWISE)
    run(model, own, 0, 3)
    saved = through_a_file(own.state_dict())
    assert {entry["step"] for entry in saved["state"].values()} == {3}
    assert len(saved["state"]) == len(SHAPES)


def test_a_closure_is_evaluated() -> None:
    model = Weights()
    own = optimizer(model)

    def closure() -> float:
        model.backward(0)
        return 2.5

    assert own.step(closure) == 2.5
    assert own.state[model.weights["bias"]]["step"] == 1
