"""Whether a model can take its rows laid end to end, found out by asking it, and how a batch is handed to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tunefleet.data.batches import Batch
from tunefleet.models import causal_lm
from tunefleet.training.attention import SEGMENTS, SegmentsUnsupported, segment_attention, segment_kwargs
from tunefleet.training.precision import autocast
from tunefleet_strategies.contract import Precision

_PROBE = "tunefleet_probe"
_PROBE_LENGTHS = (9, 6)


@dataclass(frozen=True)
class Layout:
    """How the rows of a micro-batch are put into one tensor."""

    padded: bool
    notices: tuple[str, ...] = ()


def choose_layout(model: nn.Module, precision: Precision, *, plain_attention: bool = False) -> Layout:
    """Lay rows end to end where the probe shows that they do not mix; else pad, and say so.

    Sets the attention of `model` accordingly.

    Args:
        plain_attention: keep the attention that the model was loaded with, and pad (`flash_attn: disabled`).
    """
    if plain_attention:
        return Layout(True, ("flash_attn: disabled pads every batch; auto lays rows end to end, which is faster.",))
    base = causal_lm(model)
    if probe(model, precision):
        base.set_attn_implementation(SEGMENTS)
        return Layout(padded=False)
    name = type(base).__name__
    return Layout(True, (f"Rows laid end to end would mix in {name}, so its batches are padded, which costs time.",))


def forward_kwargs(batch: Batch) -> dict[str, Any]:
    """The arguments of `model.forward` for a micro-batch, without labels and without a cache."""
    kwargs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.attention_mask is not None:
        # Right padding needs no explicit positions, and some of the models that are padded take none.
        return kwargs | {"attention_mask": batch.attention_mask}
    return kwargs | {
        "position_ids": batch.position_ids,
        **segment_kwargs(batch.segment_lengths, batch.input_ids.device),
    }


def probe(model: nn.Module, precision: Precision) -> bool:
    """Whether two short segments give the same logits end to end as alone, and the first never moves the second.

    Runs in eval mode, without gradients and without touching any random state; afterwards the attention is the one
    that the model came with.
    """
    base = causal_lm(model)
    before = base.config._attn_implementation
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    first, second, other = (
        torch.randint(vocabulary, (1, n), generator=generator) for n in (*_PROBE_LENGTHS, _PROBE_LENGTHS[0])
    )
    device = next(base.parameters()).device
    with evaluating(base), torch.no_grad(), autocast(base, precision):
        alone = [base(input_ids=ids.to(device), use_cache=False).logits[0] for ids in (first, second)]
        try:
            joined, moved = _end_to_end(base, [first, second]), _end_to_end(base, [other, second])
        except SegmentsUnsupported:
            return False
        finally:
            base.set_attn_implementation(before)
    if joined is None or moved is None:
        return False
    expected = torch.cat(alone)
    rounding = 1e-4 if expected.dtype == torch.float32 else 3e-2
    leaked = _difference(moved[_PROBE_LENGTHS[0] :], joined[_PROBE_LENGTHS[0] :])
    return _difference(joined, expected) <= rounding and leaked <= 1e-3


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two sets of logits, relative to their range."""
    span = (theirs.max() - theirs.min()).float().clamp(min=1e-12)
    return float((ours.float() - theirs.float()).abs().max() / span)


def _end_to_end(base: PreTrainedModel, segments: Sequence[Tensor]) -> Tensor | None:
    """(sum of t, V), or None when our attention was not the one that ran, or missed a window that the mask had."""
    windows_of_masks: set[int] = set()
    windows_of_layers: set[int] = set()

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        windows_of_layers.add(kwargs.get("sliding_window") or 0)
        return segment_attention(*args, **kwargs)

    def mask(**kwargs: Any) -> None:
        windows_of_masks.add(kwargs.get("local_size") or kwargs.get("chunk_size") or 0)

    AttentionInterface.register(_PROBE, attend)
    AttentionMaskInterface.register(_PROBE, mask)
    base.set_attn_implementation(_PROBE)
    device = next(base.parameters()).device
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in segments])[None]
    output = base(
        input_ids=torch.cat(list(segments), dim=1).to(device),
        position_ids=positions.to(device),
        use_cache=False,
        **segment_kwargs([ids.shape[1] for ids in segments], device),
    )
    # A local mask (window or chunk) that no layer's arguments mention would be lost; only longer rows would show it.
    if not windows_of_layers or not windows_of_masks - {0} <= windows_of_layers:
        return None
    logits = output.logits[0]
    assert isinstance(logits, Tensor)
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
