"""PiSSA: factors that start as the principal part of a weight, and the way back to an ordinary adapter.

Meng et al., arXiv 2404.02948, equations 2 to 4. Legend: W (m x n) weight, U (m x r), S (r), V (n x r) its leading
singular triples, s scale; A0 = sqrt(S / s) V^T (r x n), B0 = U sqrt(S / s) (m x r), W_res = W - s B0 A0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from tunefleet_strategies.contract import AttachContext
from tunefleet_strategies.errors import StrategyError

TRAINED_FOLDER = "pissa_adapter"
INITIAL_FOLDER = "pissa_initial"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Split:
    """One layer whose weight is split."""

    path: str
    """In the adapted model: PEFT saves the factors under this name."""
    layer: LoraLinear
    a: nn.Linear
    """Holds A (r x n)."""
    b: nn.Linear
    """Holds B (m x r)."""

    @property
    def scale(self) -> float:
        return float(self.layer.scaling[self.layer.active_adapters[0]])

    @property
    def names(self) -> tuple[str, str]:
        return f"{self.path}.lora_A.weight", f"{self.path}.lora_B.weight"

    @property
    def weight(self) -> Tensor:
        """The base weight as (m x n); GPT-2's `Conv1D` stores it the other way round."""
        stored: Tensor = self.layer.get_base_layer().get_parameter("weight")
        return stored.T if self.layer.fan_in_fan_out else stored


def splits(model: PeftModel) -> list[Split]:
    """Every layer that PiSSA splits, in module order."""
    found: list[Split] = []
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            name = layer.active_adapters[0]
            found.append(Split(path, layer, _linear(layer.lora_A[name]), _linear(layer.lora_B[name])))
    return found


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise StrategyError(f"PEFT holds a factor in {type(module).__name__}; use peft 0.21")
    return module


def factors(model: PeftModel) -> dict[str, Tensor]:
    """A and B of every split layer, under the names that PEFT saves them under."""
    found: dict[str, Tensor] = {}
    for one in splits(model):
        found |= {one.names[0]: one.a.weight, one.names[1]: one.b.weight}
    return found


@torch.no_grad()
def split(model: PeftModel, iterations: int, context: AttachContext) -> None:
    """Put the principal part of each weight into its factors, and leave the residual in the base.

    With `context.initial` the factors of the run's beginning are taken as they are: a second factorisation would not
    repeat the first bit by bit. Elsewhere only the source process factorises; the others hold zeros until its values
    reach them. The caller has seeded the random state; nothing else is drawn from it here.

    Raises:
        StrategyError: the rank exceeds a weight's smaller side, or the initial factors are not this model's.
    """
    for one in splits(model):
        rank, side = one.a.weight.shape[0], min(one.a.in_features, one.b.out_features)
        if rank > side:
            raise StrategyError(
                f"pissa_init: lora_rank {rank} exceeds the smaller side {side} of {one.path}, which has no more "
                f"singular values; write lora_rank: {side} or less"
            )
        if one.weight.device.type != "meta":
            _split_one(one, iterations, context)


def _split_one(one: Split, iterations: int, context: AttachContext) -> None:
    with context.gather([one.layer.get_base_layer().get_parameter("weight")]):
        _split_whole(one, iterations, context)
    _measure_again(one)  # on every process: where weights are shared out, PEFT gathers this one once more


def _split_whole(one: Split, iterations: int, context: AttachContext) -> None:
    held = context.precision.trainable
    weight = one.weight  # (m, n)
    if context.initial is not None:
        a0, b0 = _stored(one, context.initial)
    elif context.is_source:
        a0, b0 = factorise(weight.float(), one.a.weight.shape[0], iterations, one.scale)
    else:
        one.a.weight.data = torch.zeros_like(one.a.weight, dtype=held)
        one.b.weight.data = torch.zeros_like(one.b.weight, dtype=held)
        return
    # Contiguous, because matrix products differ in their last bits with the layout, and storage keeps no strides.
    one.a.weight.data = a0.to(weight.device, held, copy=True).contiguous()
    one.b.weight.data = b0.to(weight.device, held, copy=True).contiguous()
    # The residual completes the factors as they are held, so what rounding takes from them it gives back.
    residual = weight.float() - one.scale * (one.b.weight.float() @ one.a.weight.float())  # (m, n)
    stored = residual.T if one.layer.fan_in_fan_out else residual
    one.layer.get_base_layer().get_parameter("weight").data = stored.to(context.precision.frozen).contiguous()


def _stored(one: Split, initial: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A0 and B0 of a layer from a run's beginning."""
    for key, like in zip(one.names, (one.a.weight, one.b.weight), strict=True):
        if key not in initial or initial[key].shape != like.shape:
            raise StrategyError(
                f"pissa_init: the initial factors of the run hold no {key} of shape {tuple(like.shape)}; resume with "
                "the model and settings that the run began with"
            )
    return initial[one.names[0]], initial[one.names[1]]


def factorise(weight: Tensor, rank: int, iterations: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 (r x n) and B0 (m x r) with s B0 A0 the best rank-r part of a weight (m x n), equations 2 and 3.

    `iterations` -1 takes the exact SVD; otherwise a randomised one with that many power iterations (Halko et al.,
    arXiv 0909.4061, algorithm 4.4) that draws from the global random state.
    """
    if iterations < 0:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=iterations)
        vh = v.T
    root = torch.sqrt(s / scale)  # (r,)
    return root[:, None] * vh, u * root


def _measure_again(one: Split) -> None:
    """DoRA's magnitudes are the row lengths of what the layer computes with, which rounding has just moved."""
    name = one.layer.active_adapters[0]
    if name not in one.layer.lora_magnitude_vector:
        return
    magnitude = one.layer.lora_magnitude_vector[name]
    if not isinstance(magnitude, DoraLinearLayer):
        raise StrategyError(f"PEFT holds magnitudes in {type(magnitude).__name__}; use peft 0.21")
    magnitude.update_layer(
        base_layer=one.layer.get_base_layer(), lora_A=one.a.weight, lora_B=one.b.weight, scaling=one.scale
    )


# --- the way back ----------------------------------------------------------------------------------------------------


def save_converted(model: PeftModel, folder: Path, initial: Mapping[str, Tensor], keep_factors: bool) -> None:
    """Write an adapter for the original base, and on request the trained and the initial factors beside it.

    Raises:
        StrategyError: the initial factors of the run are missing.
    """
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = factors(model)
    if missing := [name for name in own if name not in initial]:
        raise StrategyError(
            f"pissa_init: the initial factors of the run hold no {missing[0]}; pass what initial_state returned"
        )
    config = next(iter(model.peft_config.values()))
    if not isinstance(config, LoraConfig):
        raise StrategyError(f"the model carries a {config.peft_type} adapter; attach LoRA to a plain model")
    base = str(model.get_base_model().name_or_path)
    _write(folder, converted_config(config), converted_state(trained, own, initial), base)
    if keep_factors:
        _write(folder / TRAINED_FOLDER, _residual_config(config), trained, base)
        plain = deepcopy(config)
        plain.use_dora, plain.modules_to_save = False, None
        _write(folder / INITIAL_FOLDER, _residual_config(plain), {name: initial[name] for name in own}, base)


def converted_state(
    trained: Mapping[str, Tensor], own: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """[A; A0] (2r x n) and [B | -B0] (m x 2r): W_res + s B A = W + s [B | -B0] [A; A0], equation 4 read backwards.

    Everything else is copied. DoRA's magnitudes too: they scale the rows of the same matrix.
    """
    state = dict(trained)
    for name in own:
        first = initial[name].to(trained[name])
        axis, sign = (0, 1.0) if name.endswith("lora_A.weight") else (1, -1.0)
        state[name] = torch.cat([trained[name], sign * first], dim=axis)
    return state


def converted_config(config: LoraConfig) -> LoraConfig:
    """Twice the rank at the same scale: 2 alpha for alpha / r, sqrt(2) alpha for alpha / sqrt(r)."""
    grow = math.sqrt(2) if config.use_rslora else 2
    converted = deepcopy(config)
    converted.r = 2 * config.r
    # sqrt(2) alpha is no whole number; PEFT declares alpha an int and computes with any number.
    converted.lora_alpha = config.lora_alpha * grow  # type: ignore[assignment]
    converted.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    converted.alpha_pattern = {name: alpha * grow for name, alpha in (config.alpha_pattern or {}).items()}
    converted.init_lora_weights = True
    return converted


def _residual_config(config: LoraConfig) -> LoraConfig:
    """Mark factors that fit the residual base only: a loader that knows PiSSA splits the base first."""
    marked = deepcopy(config)
    marked.init_lora_weights = "pissa"
    return marked


def _write(folder: Path, config: LoraConfig, state: Mapping[str, Tensor], base: str) -> None:
    """Write one adapter folder as PEFT lays it out."""
    written = deepcopy(config)
    written.inference_mode = True
    written.base_model_name_or_path = config.base_model_name_or_path or base
    folder.mkdir(parents=True, exist_ok=True)
    written.save_pretrained(str(folder))
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
