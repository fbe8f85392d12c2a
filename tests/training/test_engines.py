"""Updates: the sum is clipped once, nothing is learned from nothing, and what is not finite ends the run."""

from __future__ import annotations

import pytest
import torch
from tests.training.tiny import FP32, MemoryRows, start
from torch import nn

from tunefleet.errors import RunFailed
from tunefleet.training.engines import plain
from tunefleet.training.engines.plain import PlainEngine
from tunefleet_strategies.contract import MethodOptimizer, Precision

HALF = Precision(torch.float16, torch.float32, torch.float16)


def engine(gradient: list[float], *, max_grad_norm: float = 0.0, precision: Precision = FP32) -> PlainEngine:
    """One weight (1, n) of ones under plain gradient descent at rate 1."""
    model = nn.Linear(len(gradient), 1, bias=False)
    nn.init.ones_(model.weight)
    model.weight.grad = torch.tensor([gradient])
    return PlainEngine(model, torch.optim.SGD(model.parameters(), lr=1.0), precision, max_grad_norm=max_grad_norm)


def weight(plain: PlainEngine) -> list[float]:
    return next(plain.model.parameters()).detach().flatten().tolist()


def test_the_gradient_is_clipped_by_its_global_norm() -> None:
    plain = engine([3.0, 4.0], max_grad_norm=1.0)
    applied = plain.update(torch.tensor(7.5), 3, step=1, stop=False)
    assert applied.grad_norm == pytest.approx(5.0)
    assert applied.loss_sum == 7.5
    assert applied.updated
    assert weight(plain) == pytest.approx([1 - 0.6, 1 - 0.8], abs=1e-5)
    assert next(plain.model.parameters()).grad is None


def test_zero_switches_clipping_off() -> None:
    plain = engine([3.0, 4.0])
    plain.update(torch.tensor(0.0), 3, step=1, stop=False)
    assert weight(plain) == pytest.approx([-2.0, -3.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_ends_the_run(bad: float) -> None:
    plain = engine([1.0, bad])
    with pytest.raises(RunFailed, match="gradient of step 12 is not finite"):
        plain.update(torch.tensor(1.0), 3, step=12, stop=False)
    assert weight(plain) == [1.0, 1.0]


def test_no_target_tokens_no_update_but_the_stop_flag_arrives() -> None:
    plain = engine([0.0, 0.0])
    plain.optimizer.param_groups[0]["weight_decay"] = 0.5  # would move the weights even without a gradient
    applied = plain.update(torch.tensor(0.0), 0, step=1, stop=True)
    assert not applied.updated
    assert applied.stop
    assert weight(plain) == [1.0, 1.0]


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    """Weight decay and moments treat it as on a rank that received zeros for it."""
    plain = engine([0.0, 0.0])
    next(plain.model.parameters()).grad = None
    plain.optimizer.param_groups[0]["weight_decay"] = 0.5
    plain.update(torch.tensor(0.0), 5, step=1, stop=False)
    assert weight(plain) == [0.5, 0.5]


def test_a_loss_scale_is_lowered_when_fp16_overflows_and_survives_a_resume() -> None:
    plain = engine([float("inf"), 0.0], precision=HALF)
    scale = plain.loss_scale()
    assert scale > 1
    assert not plain.update(torch.tensor(1.0), 3, step=1, stop=False).updated
    assert weight(plain) == [1.0, 1.0]
    assert plain.loss_scale() == scale / 2
    other = engine([scale / 2, 0.0], precision=HALF)
    other.restore(plain.state())
    assert other.loss_scale() == scale / 2
    assert other.update(torch.tensor(1.0), 3, step=2, stop=False).updated
    assert weight(other) == pytest.approx([0.0, 1.0])


def test_buckets_hold_every_parameter_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_BUCKET_ENTRIES", 10)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (4, 6, 1, 30, 2, 3)]
    buckets = plain._buckets(parameters)
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[4, 6], [1], [30], [2, 3]]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]


def test_a_parameter_that_stops_training_is_left_alone() -> None:
    from tunefleet_strategies.full import Full

    run = start(Full(), "llama", rows=MemoryRows(count=8), updates=3)
    head = run.model.get_parameter("lm_head.weight")
    list(run.steps(last=1))
    head.requires_grad_(False)
    before = head.detach().clone()
    list(run.steps(first=1))
    assert torch.equal(head, before)


class HalfMeasured(MethodOptimizer):
    """Gradient descent that uses the first entry of the gradient only."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__([weight], {"lr": 1.0})
        self.weight = weight
        self.told = ["one"]

    def gradient_norm(self) -> torch.Tensor:
        assert self.weight.grad is not None
        return self.weight.grad[0, 0].abs()

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        assert self.weight.grad is not None
        self.weight.data[0, 0] -= self.weight.grad[0, 0]

    def messages(self) -> list[str]:
        told, self.told = self.told, []
        return told


class InBackward(MethodOptimizer):
    """An update that the backward pass has done: nothing is left for the engine but the norm."""

    steps_in_backward = True

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__([weight], {"lr": 1.0})
        self.ended = 0

    def gradient_norm(self) -> torch.Tensor:
        return torch.tensor(3.0)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.ended += 1


def test_a_method_says_which_norm_is_clipped_and_speaks() -> None:
    model = engine([3.0, 4.0]).model
    plain = PlainEngine(model, HalfMeasured(model.get_parameter("weight")), FP32, max_grad_norm=1.0)
    applied = plain.update(torch.tensor(1.0), 3, step=1, stop=False)
    assert applied.grad_norm == 3.0
    assert weight(plain) == pytest.approx([0.0, 1.0], abs=1e-5)
    assert plain.messages() == ["one"]
    assert plain.messages() == []


def test_an_update_in_the_backward_pass_is_only_ended() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = InBackward(model.weight)
    applied = PlainEngine(model, optimizer, FP32, max_grad_norm=0.0).update(torch.tensor(1.0), 3, step=1, stop=False)
    assert applied.grad_norm == 3.0
    assert optimizer.ended == 1
    assert model.weight.grad is None  # the engine has made none
