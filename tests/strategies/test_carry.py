"""A run goes on under other values: the same function where a rank grows, and only values that may change do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.carry import carry, mutable_keys
from tunefleet_strategies.contract import OptimizerSpec, Saved, Strategy
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.full import Full
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.lora import Lora

Call = Callable[..., Any]
SPEC = OptimizerSpec("adamw_torch", 1e-2, weight_decay=0.01)


def trained(strategy: Strategy, model: Any, tokens: torch.Tensor, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = strategy.optimizer(model, SPEC)
    go_on(model, optimizer, tokens, steps)
    return optimizer


def go_on(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def saved(model: Any, optimizer: torch.optim.Optimizer) -> Saved:
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    numbered = tuple(names[id(p)] for group in optimizer.param_groups for p in group["params"])
    return Saved(weights, copy.deepcopy(optimizer.state_dict()), numbered)


def restored(strategy: Strategy, model: Any, state: Saved) -> torch.optim.Optimizer:
    """Put carried state into a model that was attached under the new values."""
    optimizer = strategy.optimizer(model, SPEC)
    optimizer.load_state_dict(dict(state.optimizer))
    for name, value in state.weights.items():
        model.get_parameter(name).data.copy_(value)
    return optimizer


FORMS: dict[str, dict[str, Any]] = {
    "alpha follows the rank": {},
    "alpha stays": {"lora_alpha": 8},
    "rsLoRA": {"lora_alpha": 8, "use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA+": {"loraplus_lr_ratio": 4.0},
    "embeddings too": {"lora_target": ("q_proj", "v_proj", "embed_tokens")},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_an_adapter_of_a_larger_rank_computes_the_same_and_learns_on(
    form: str, build: Call, attach: Call, tokens: torch.Tensor, logits: Call
) -> None:
    before = Lora(lora_rank=4, **FORMS[form])
    now = Lora(lora_rank=6, **FORMS[form])
    model = attach(before, build("llama"))
    state = saved(model, trained(before, model, tokens))
    carried = carry(state, before, now, 0.2, seed=1)
    again = attach(now, build("llama"))
    optimizer = restored(now, again, carried)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-5)
    losses = go_on(again, optimizer, tokens, 5)
    assert losses[-1] < losses[0]
    assert {group["weight_decay"] for group in optimizer.param_groups} <= {0.2, 0.0}
    # What is new has learnt: the last row of some A is not what it was drawn as.
    name = next(name for name in carried.weights if name.endswith("q_proj.lora_A.default.weight"))
    assert not torch.equal(again.get_parameter(name)[-1], carried.weights[name][-1])
    assert again.get_parameter(name.replace("lora_A", "lora_B"))[:, -1].any()


def test_an_adapter_of_a_smaller_rank_is_near_and_learns_on(
    build: Call, attach: Call, tokens: torch.Tensor, logits: Call
) -> None:
    before, now = Lora(lora_rank=4, lora_alpha=8), Lora(lora_rank=3, lora_alpha=8)
    model = attach(before, build("llama"))
    untrained = logits(model)
    state = saved(model, trained(before, model, tokens))
    again = attach(now, build("llama"))
    optimizer = restored(now, again, carry(state, before, now, 0.0, seed=1))
    lost = (logits(again) - logits(model)).norm()
    assert 0 < lost < 0.5 * (untrained - logits(model)).norm()
    losses = go_on(again, optimizer, tokens, 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("proj", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("rank", [4, 12])
def test_a_run_by_galore_goes_on_at_another_rank(
    proj: Any, rank: int, build: Call, attach: Call, tokens: torch.Tensor
) -> None:
    before = GaLore(galore_rank=8, galore_proj_type=proj, galore_update_interval=100)
    now = GaLore(galore_rank=rank, galore_proj_type=proj, galore_update_interval=4)
    model = attach(before, build("llama"))
    state = saved(model, trained(before, model, tokens))
    again = attach(now, build("llama"))
    optimizer: Any = restored(now, again, carry(state, before, now, 0.0, seed=1))
    weight = again.get_parameter("model.layers.0.mlp.up_proj.weight")
    old = optimizer.state[weight]["exp_avg"].clone()
    assert rank in old.shape
    losses = go_on(again, optimizer, tokens, 3)  # the last of these refreshes: the fifth update of an interval of four
    assert losses[-1] < losses[0]
    fresh = now.optimizer(again, SPEC)
    assert [group["rank"] for group in optimizer.param_groups] == [group["rank"] for group in fresh.param_groups]
    assert {group["update_interval"] for group in optimizer.param_groups if group["rank"]} == {4}


def test_only_values_that_may_change_do(build: Call, attach: Call, tokens: torch.Tensor) -> None:
    assert mutable_keys(Full()) == {"learning_rate", "weight_decay"}
    assert mutable_keys(Lora()) == {"learning_rate", "weight_decay", "lora_rank"}
    assert mutable_keys(Lora(pissa_init=True)) == {"learning_rate", "weight_decay"}
    assert mutable_keys(BAdam()) == {"learning_rate", "weight_decay", "badam_switch_interval"}
    assert mutable_keys(GaLore(optimizer_backend="upstream")) == {"learning_rate", "weight_decay"}
    nothing = Saved({}, {"state": {}, "param_groups": []}, ())
    for before, now, sentence in [
        (Lora(), Lora(use_dora=True), "use_dora cannot change while a run goes on: lora knows of no way"),
        (
            Lora(pissa_init=True),
            Lora(pissa_init=True, lora_rank=4),
            r"lora_rank cannot change .*pissa_init made the base",
        ),
        (GaLore(), GaLore(galore_scale=1.0), "galore_scale cannot change"),
        (Full(), Lora(), "a run by full cannot go on by lora; keep the method"),
    ]:
        with pytest.raises(StrategyError, match=sentence):
            carry(nothing, before, now, 0.0, seed=0)
    # What changes no number may differ.
    assert carry(nothing, BAdam(), BAdam(badam_verbose=2), 0.0, seed=0) == nothing


def test_factors_of_several_experts_in_one_tensor_are_refused(build: Call, attach: Call, tokens: torch.Tensor) -> None:
    before = Lora(lora_rank=4)
    model = attach(before, build("moe"))
    state = saved(model, before.optimizer(model, SPEC))
    with pytest.raises(StrategyError, match=r"lora_rank cannot change .* holds the factors of several experts"):
        carry(state, before, Lora(lora_rank=8), 0.0, seed=0)
