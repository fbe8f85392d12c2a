"""The strategy GaLore: what it projects, what it refuses, and what it tells."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from galore_torch import GaLoreAdamW8bit
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM

from tunefleet_strategies.contract import ADAMW, OptimizerSpec, Precision, Traits
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.optim import upstream_galore
from tunefleet_strategies.optim.galore import Behaviour, GaLoreAdamW

Call = Callable[..., Any]
SPEC = OptimizerSpec("adamw_torch", 1e-3, weight_decay=0.1)
HALF = Precision(compute=torch.float16, trainable=torch.float32, frozen=torch.float16)
MATRICES = {"llama": 7, "qwen2_tied": 7, "gpt2": 4, "moe": 6}
"""Projected parameters of one layer; the fused experts of the mixture are two tensors."""


def projected(strategy: GaLore, model: nn.Module) -> set[str]:
    """Names of the parameters that really have a rank."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = strategy.optimizer(model, SPEC).param_groups
    return {names[id(p)] for group in groups if group["rank"] for p in group["params"]}


def test_defaults_are_the_documented_ones() -> None:
    own = GaLore()
    assert (own.galore_rank, own.galore_scale, own.galore_update_interval) == (16, 0.25, 200)
    assert (own.galore_proj_type, own.galore_layerwise, own.galore_target) == ("std", False, ("all",))


def test_everything_trains_and_all_projects_the_matrices_of_the_layers(
    architecture: str, build: Call, attach: Call, train: Call
) -> None:
    strategy = GaLore(galore_rank=4, galore_scale=1.0, galore_update_interval=2)
    model = attach(strategy, build(architecture))
    assert all(p.requires_grad for p in model.parameters())
    names = projected(strategy, model)
    assert len(names) == 3 * MATRICES[architecture]
    assert not any(part in name for name in names for part in ("embed", "wte", "lm_head", "norm", "ln_", "bias"))
    losses = train(strategy, model, steps=5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("mlp", 9),
        ("mlp,self_attn", 21),
        ("self_attn.q_proj", 3),
        ("layers.1", 7),
        ("q_proj,lm_head", 4),
        ("model.layers.2.mlp.up_proj", 1),
    ],
)
def test_names_mean_every_matrix_inside(target: str, count: int, build: Call, attach: Call) -> None:
    strategy = GaLore.model_validate({"galore_target": target})
    assert len(projected(strategy, attach(strategy, build("llama")))) == count


def test_experts_are_projected_by_name(build: Call, attach: Call) -> None:
    strategy = GaLore(galore_target=("experts",))
    names = projected(strategy, attach(strategy, build("moe")))
    assert {name.rsplit(".", 1)[-1] for name in names} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("ml", "did you mean `mlp`"),
        ("attn", "`attn` matches no module with a linear map"),
        ("embed_tokens", "matches no module"),
        ("norm", "matches no module"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(target: str, said: str, build: Call, attach: Call) -> None:
    with pytest.raises(StrategyError, match=said):
        attach(GaLore(galore_target=("mlp", target)), build("llama"))


def test_a_head_that_the_embedding_shares_is_no_target(build: Call, attach: Call) -> None:
    with pytest.raises(StrategyError, match="`lm_head` shares its matrix with the embedding"):
        attach(GaLore(galore_target=("lm_head",)), build("qwen2_tied"))


@pytest.mark.parametrize("target", ["mlp,", "all,mlp", "mlp,mlp"])
def test_lists_with_a_wrong_piece_are_refused(target: str) -> None:
    with pytest.raises(ValidationError):
        GaLore.model_validate({"galore_target": target})


@pytest.mark.parametrize(
    "keys",
    [
        *({"galore_rank": 0}, {"galore_update_interval": 0}, {"galore_scale": 0}, {"galore_proj_type": "both"}),
        *({"galore_refresh": "qr"}, {"bf16_rounding": "up"}, {"optimizer_backend": "theirs"}),
    ],
)
def test_values_that_mean_nothing_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GaLore.model_validate(keys)


# ---- traits and notices ---------------------------------------------------------------------------------------------


def test_traits_follow_from_the_arguments() -> None:
    assert GaLore().traits() == Traits(optimizers=ADAMW)
    layerwise = GaLore(galore_layerwise=True).traits()
    assert (layerwise.max_workers, layerwise.accumulation, layerwise.clipping) == (1, False, False)
    assert layerwise.resumable
    upstream = GaLore(optimizer_backend="upstream").traits()
    assert (upstream.max_workers, upstream.resumable, upstream.optimizers) == (1, False, ADAMW | {"adamw_8bit"})
    assert not any(own.shardings for own in (GaLore().traits(), layerwise, upstream))  # DeepSpeed is refused


def test_a_rank_that_is_cut_is_told_with_the_matrices(build: Call, attach: Call) -> None:
    strategy = GaLore(galore_rank=20, galore_scale=1.0)
    model = attach(strategy, build("llama", meta=True))
    assert strategy.notices(model) == [
        "galore_rank 20 is more than the smaller side of some matrices, which take it: 3 x k_proj (16), 3 x v_proj (16)"
    ]
    assert GaLore(galore_rank=16, galore_scale=1.0).notices(model) == []


def test_what_a_person_should_know_is_told(build: Call, attach: Call, pure_bf16: Precision) -> None:
    model = attach(GaLore(), build("moe"), precision=pure_bf16)
    told = " ".join(GaLore(galore_rank=4, optimizer_backend="upstream").notices(model, updates=100))
    for part in ("without an fp32 copy", "galore_scale is left out", "fused expert tensors", "not reached in 100"):
        assert part in told
    assert "moments are bf16 too" in told  # those of galore-torch are
    native = GaLore(galore_rank=4).notices(model)
    assert "without an fp32 copy" in native[0]
    assert "moments" not in native[0]
    plain = attach(GaLore(), build("llama"))
    rounded = GaLore(galore_rank=4, galore_scale=1.0, bf16_rounding="stochastic")
    assert "stochastic does nothing" in " ".join(rounded.notices(plain))
    assert "stochastic" not in " ".join(rounded.notices(model))
    assert GaLore(galore_rank=4, galore_scale=0.25, galore_update_interval=10).notices(plain, updates=100) == []


def test_fp16_and_layerwise_do_not_go_together(build: Call, attach: Call) -> None:
    with pytest.raises(StrategyError, match=r"galore_layerwise .* fp16"):
        attach(GaLore(galore_layerwise=True), build("llama", meta=True), precision=HALF)
    attach(GaLore(), build("llama", meta=True), precision=HALF)


def test_sgd_has_no_projected_form(build: Call, attach: Call) -> None:
    with pytest.raises(StrategyError, match="optim: adamw_torch"):
        GaLore().optimizer(attach(GaLore(), build("llama")), OptimizerSpec("sgd", 1e-3))


def test_several_workers_and_layerwise_are_refused_where_the_optimizer_is_built(
    build: Call, attach: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunefleet_strategies.optim import galore

    strategy = GaLore(galore_layerwise=True)
    model = attach(strategy, build("llama"))
    monkeypatch.setattr(galore, "_world", lambda: 2)
    with pytest.raises(StrategyError, match="ray_num_workers: 1"):
        strategy.optimizer(model, SPEC)


def test_export_loads_without_us(architecture: str, build: Call, attach: Call, logits: Call, tmp_path: Path) -> None:
    model = attach(GaLore(), build(architecture))
    GaLore().export(model, tmp_path, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_a_search_knows_the_arguments() -> None:
    assert set(GaLore().search_space()) - {"learning_rate"} <= set(GaLore.model_fields)


# ---- the upstream optimizer -----------------------------------------------------------------------------------------


def test_upstream_runs_galore_torch_itself_and_agrees_with_ours(build: Call, attach: Call, train: Call) -> None:
    keys = {"galore_rank": 4, "galore_update_interval": 2, "galore_scale": 1.0}
    ours, theirs = (
        GaLore.model_validate(keys | {"galore_refresh": "svd"}),
        GaLore.model_validate(keys | {"optimizer_backend": "upstream"}),
    )
    model, other = attach(ours, build("llama")), attach(theirs, build("llama"))
    optimizer = theirs.optimizer(other, SPEC)
    assert type(optimizer).__module__ == "galore_torch.adamw"
    assert not isinstance(optimizer, GaLoreAdamW)
    assert train(theirs, other, steps=5) == pytest.approx(train(ours, model, steps=5), rel=1e-4)


def test_what_galore_torch_does_not_know_is_refused_or_left_at_what_it_does() -> None:
    strategy = GaLore.model_validate({"optimizer_backend": "upstream"})
    assert (strategy.galore_refresh, strategy.galore_stagger, strategy.bf16_rounding) == ("svd", False, "nearest")
    assert GaLore.model_validate(strategy.model_dump()) == strategy
    for keys in (
        *({"galore_refresh": "subspace"}, {"galore_stagger": True}, {"bf16_rounding": "stochastic"}),
        {"galore_layerwise": True},
    ):
        with pytest.raises(ValidationError, match="optimizer_backend: native"):
            GaLore.model_validate({"optimizer_backend": "upstream", **keys})


def test_upstream_leaves_fused_experts_unprojected(build: Call, attach: Call, train: Call) -> None:
    strategy = GaLore(galore_rank=4, galore_scale=1.0, optimizer_backend="upstream")
    model = attach(strategy, build("moe"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = strategy.optimizer(model, SPEC).param_groups
    assert not any("experts" in names[id(p)] for group in groups if "rank" in group for p in group["params"])
    losses = train(strategy, model, steps=4)
    assert losses[-1] < losses[0]


def test_the_upstream_failure_at_full_rank_is_refused_beforehand(build: Call, attach: Call) -> None:
    keys = {"galore_proj_type": "reverse_std", "galore_rank": 16}
    with pytest.raises(StrategyError, match=r"k_proj.*galore_rank: 15"):
        attach(GaLore.model_validate(keys | {"optimizer_backend": "upstream"}), build("llama", meta=True))
    attach(GaLore.model_validate(keys), build("llama", meta=True))


def test_eight_bits_need_a_cuda_device(build: Call, attach: Call) -> None:
    strategy = GaLore(optimizer_backend="upstream", galore_rank=4)
    with pytest.raises(StrategyError, match=r"CUDA device .*write optim: adamw_torch"):
        strategy.optimizer(attach(strategy, build("llama")), OptimizerSpec("adamw_8bit", 1e-3))


def test_eight_bits_have_the_settings_that_galore_torch_means() -> None:
    """Handed on by position, two of them arrive as others in the bitsandbytes of today."""
    matrix = nn.Parameter(torch.zeros(8, 8))
    theirs = GaLoreAdamW8bit([matrix])
    ours = upstream_galore.eight_bit([{"params": [matrix]}], OptimizerSpec("adamw_8bit", 1e-2))
    names = ("max_unorm", "skip_zeros")
    assert [theirs.get_config(0, 0, theirs.param_groups[0])[name] for name in names] == [100, True]
    assert isinstance(ours, GaLoreAdamW8bit)
    assert [ours.get_config(0, 0, ours.param_groups[0])[name] for name in names] == [0.0, False]


def test_eight_bits_follow_the_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes has kernels for a CPU too; all that galore-torch asks of CUDA is to wait for it."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    generator = torch.Generator().manual_seed(0)
    started = torch.randn(256, 128, generator=generator)
    matrix, vector = (nn.Parameter(tensor.clone()) for tensor in (started, torch.zeros(8192)))
    exact, plain = (nn.Parameter(tensor.clone()) for tensor in (started, torch.zeros(8192)))
    how = {"rank": 32, "projection": "std", "update_interval": 2, "scale": 1.0, "weight_decay": 0.0}
    spec = OptimizerSpec("adamw_8bit", 1e-2)
    small = upstream_galore.eight_bit([{"params": [matrix], **how}, {"params": [vector], "weight_decay": 0.0}], spec)
    large = GaLoreAdamW([{"params": [exact], **how}, {"params": [plain], "weight_decay": 0.0}], spec, Behaviour("svd"))
    for step in range(4):
        gradient = torch.randn(256, 128, generator=generator)
        pushed = torch.ones(8192) if step == 0 else torch.zeros(8192)  # what its moments go on to move
        for one, other, optimizer in ((matrix, vector, small), (exact, plain, large)):
            one.grad, other.grad = gradient.clone(), pushed.clone()
            optimizer.step()
    assert small.state[matrix]["state1"].dtype == torch.uint8
    wanted = (exact - started).detach()
    assert float((matrix - started - wanted).detach().norm()) < 0.1 * float(wanted.norm())
    assert float((vector - plain).detach().norm()) < 0.1 * float(plain.detach().norm())


@pytest.mark.parametrize("missing", ["galore_torch", "bitsandbytes"])
def test_a_missing_package_is_named(missing: str, build: Call, attach: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(upstream_galore, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(StrategyError, match=f"needs {missing}.*write optimizer_backend: native"):
        attach(GaLore(optimizer_backend="upstream"), build("llama", meta=True))
