"""The native GaLore against galore-torch, step by step on recorded gradients; its defect shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from galore_torch.adamw import AdamW as ReferenceAdamW
from torch import Tensor

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.optim.galore import Behaviour, GaLoreAdamW
from tunefleet_strategies.optim.groups import Group
from tunefleet_strategies.optim.projection import Projection

RANK, INTERVAL, STEPS, SCALE, RATE = 4, 20, 50, 0.25, 1e-2
SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16), "bias": (12,), "embedding": (20, 12)}
PROJECTED = ("tall", "wide", "square")

Recorded = list[dict[str, Tensor]]


def recorded(seed: int = 0) -> Recorded:
    """Fifty gradients of each shape: a slowly turning strong part of rank 5, and noise of full rank."""
    generator = torch.Generator().manual_seed(seed)
    draw: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    strong = {name: (draw(s[0], 5), draw(5, *s[1:])) for name, s in SHAPES.items()}
    steps = []
    for _ in range(STEPS):
        strong = {n: (a + 0.2 * draw(*a.shape), b + 0.2 * draw(*b.shape)) for n, (a, b) in strong.items()}
        steps.append({n: 0.1 * (a @ b + 0.3 * draw(*SHAPES[n])) for n, (a, b) in strong.items()})
    return steps


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def native(
    own: dict[str, Tensor], projection: Projection, decay: float, eps: float, rank: int = RANK, rate: float = RATE
) -> GaLoreAdamW:
    how = {"rank": rank, "projection": projection, "update_interval": INTERVAL, "scale": SCALE}
    groups: list[Group] = [
        {"params": [own[name] for name in PROJECTED], "weight_decay": decay, **how},
        {"params": [own["bias"]], "weight_decay": 0.0},
        {"params": [own["embedding"]], "weight_decay": decay},
    ]
    return GaLoreAdamW(groups, OptimizerSpec("adamw_torch", rate, (0.9, 0.999), eps), Behaviour(refresh="svd"))


def reference(own: dict[str, Tensor], projection: Projection, decay: float, eps: float) -> ReferenceAdamW:
    how = {"rank": RANK, "proj_type": projection, "update_proj_gap": INTERVAL, "scale": SCALE}
    groups = [
        {"params": [own[name] for name in PROJECTED], "weight_decay": decay, **how},
        {"params": [own["bias"]], "weight_decay": 0.0},
        {"params": [own["embedding"]], "weight_decay": decay},
    ]
    return ReferenceAdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=eps, no_deprecation_warning=True)


def feed(own: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    for name, parameter in own.items():
        parameter.grad = gradients[name].clone()


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("projection", get_args(Projection))
def test_equal_to_the_reference_after_every_step(projection: Projection, decay: float, eps: float) -> None:
    ours, theirs = weights(), weights()
    started = {name: parameter.detach().clone() for name, parameter in ours.items()}
    own, other = native(ours, projection, decay, eps), reference(theirs, projection, decay, eps)
    for step, gradients in enumerate(recorded()):
        feed(ours, gradients)
        feed(theirs, gradients)
        own.step()
        other.step()
        for name in SHAPES:
            p, q = ours[name].detach(), theirs[name].detach()
            assert float((p - q).abs().max()) <= 1e-5 * float(q.abs().max()), (step, name)
            moved = q - started[name]
            assert float((p - started[name] - moved).norm()) <= 2e-5 * float(moved.norm()), (step, name)


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("projection", [kind for kind in get_args(Projection) if kind != "full"])
def test_near_the_reference_where_each_follows_its_own_gradients(projection: Projection, eps: float) -> None:
    """As in training: what differs by rounding comes back through the gradients. Not so close under `full`."""
    ours, theirs = weights(), weights()
    started = {name: parameter.detach().clone() for name, parameter in ours.items()}
    own, other = native(ours, projection, 0.1, eps), reference(theirs, projection, 0.1, eps)
    for gradients in recorded():
        for side, optimizer in ((ours, own), (theirs, other)):
            for name, parameter in side.items():
                parameter.grad = gradients[name] + 0.1 * parameter.detach().sin()
            optimizer.step()
    for name in SHAPES:
        moved = theirs[name].detach() - started[name]
        assert float((ours[name].detach() - started[name] - moved).norm()) <= 1e-4 * float(moved.norm()), name


@pytest.mark.parametrize("rank", [12, 16])
def test_the_reference_fails_at_reverse_std_where_a_wide_matrix_has_full_rank_and_ours_does_not(rank: int) -> None:
    gradient = recorded()[0]["wide"]
    theirs = torch.nn.Parameter(torch.zeros(12, 24))
    how = {"rank": rank, "proj_type": "reverse_std", "update_proj_gap": INTERVAL, "scale": SCALE}
    other = ReferenceAdamW([{"params": [theirs], **how}], lr=RATE, no_deprecation_warning=True)
    theirs.grad = gradient.clone()
    with pytest.raises(RuntimeError):
        other.step()
    ours = weights()
    own = native(ours, "reverse_std", 0.0, 1e-8, rank=rank)
    feed(ours, recorded()[0])
    own.step()
    assert own.state[ours["wide"]]["exp_avg"].shape == (12, 12)


ELSEWHERE = [
    (projection, shape, rank)
    for projection in get_args(Projection)
    for shape in ((24, 12), (12, 24), (12, 12))
    for rank in (4, 11, 12, 30)
    if not (projection == "reverse_std" and shape == (12, 24) and rank >= 12)
]


@pytest.mark.parametrize(("projection", "shape", "rank"), ELSEWHERE)
def test_the_reference_runs_everywhere_else(projection: Projection, shape: tuple[int, int], rank: int) -> None:
    theirs = torch.nn.Parameter(torch.zeros(shape))
    how = {"rank": rank, "proj_type": projection, "update_proj_gap": INTERVAL, "scale": SCALE}
    other = ReferenceAdamW([{"params": [theirs], **how}], lr=RATE, no_deprecation_warning=True)
    theirs.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    other.step()
    assert float(theirs.detach().abs().max()) > 0
