"""Attention over rows laid end to end: each segment sees itself only, and no mask over the whole batch is built.

Shapes: B batch (1 here), H query heads, K key heads, T tokens of the batch, t tokens of one segment, D head width.

Transformers asks for attention by name. Ours is registered as `tunefleet_segments`. The mask interface gets no entry of
that name on purpose: transformers then builds no mask at all, and a model gives us `attention_mask=None`.
Cost is the sum of t^2, never T^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

SEGMENTS = "tunefleet_segments"

_FOREIGN = ("s_aux", "position_bias", "head_mask", "cache", "block_mask", "indices")
"""Arguments with which some architectures change what attention computes. This function knows none of them."""


class SegmentsUnsupported(RuntimeError):
    """The architecture asks its attention for something that per-segment attention cannot give."""


def segment_kwargs(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What `model(...)` hands down to every attention layer.

    `segment_lengths` (host integers) serves the per-segment path without a device synchronisation; the names with
    `cu_seq_lens` are transformers' own for variable-length kernels.
    """
    kwargs: dict[str, Any] = {"segment_lengths": tuple(lengths)}
    if device.type == "cuda":
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
        longest = max(lengths)
        kwargs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return kwargs


def segment_attention(
    module: nn.Module,  # noqa: ARG001 (transformers passes it)
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    **others: Any,  # transformers hands every layer what anyone gave to model.forward
) -> tuple[Tensor, None]:
    """Causal attention inside each segment; the signature is transformers' attention interface.

    Returns:
        (1, T, H, D), and no attention weights.

    Raises:
        SegmentsUnsupported: no lengths arrived, or the layer wants a mask, a bias or attention in both directions.
    """
    if segment_lengths is None or sum(segment_lengths) != query.shape[2] or query.shape[0] != 1:
        raise SegmentsUnsupported("the lengths of the segments did not reach the attention layer")
    if attention_mask is not None or is_causal is False or any(others.get(name) is not None for name in _FOREIGN):
        raise SegmentsUnsupported("the layer asks for a mask, a bias or attention in both directions")
    if query.is_cuda:
        query, key, value = in_compute_format(query, key, value)
    if _kernel_fits(query, value, dropout, softcap):
        return _variable_length(query, key, value, scaling, sliding_window, others), None
    return _per_segment(query, key, value, list(segment_lengths), dropout, scaling, sliding_window, softcap), None


def in_compute_format(*tensors: Tensor) -> list[Tensor]:
    """Bring what attention reads into the format of autocast, which does so for torch's own attention and not for ours.

    Under mixed precision rotary embeddings leave queries and keys in fp32, beside values in bf16.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    dtype = query.dtype
    if query.device.type == "cpu":
        # A CPU's bf16 attention kernel takes 2.4 times as long as its fp32 one at 75 tokens, and as long at 512.
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        # One split, not a slice for each segment: the backward of a split is one cat, a slice's is a padded add.
        parts = zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True)
        if softcap is None:
            outputs = [_scaled(q, k, v, dropout, scaling, window) for q, k, v in parts]
        else:
            outputs = [_softcapped(q, k, v, dropout, scaling, window, softcap) for q, k, v in parts]
        return torch.cat(outputs, dim=1).to(dtype)  # (1, T, H, D)


def _kernel_fits(query: Tensor, value: Tensor, dropout: float, softcap: float | None) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    same_width = query.shape[-1] == value.shape[-1] <= 256
    return query.is_cuda and half and same_width and dropout == 0.0 and softcap is None


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, lengths: dict[str, Any]
) -> Tensor:
    bounds, longest = lengths["cu_seq_lens_q"], lengths["max_length_q"]
    # A window of w tokens counts the token itself, the kernel's left side does not.
    left = -1 if window is None else window - 1
    output = varlen_attn(
        query[0].transpose(0, 1),  # (T, H, D)
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)  # (1, T, H, D)


def _scaled(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    tokens = q.shape[2]
    masked = window is not None and tokens > window
    grouped = q.shape[1] != k.shape[1]
    if masked and grouped:  # the masked kernels know no groups
        k, v, grouped = _repeat(k, q), _repeat(v, q), False
    mask = _window_mask(tokens, window, q.device) if masked and window is not None else None
    output = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2)  # (1, t, H, D)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None, softcap: float
) -> Tensor:
    """Written out, since no fused kernel caps its scores: softcap * tanh(scores / softcap) (Gemma 2, section 2.2)."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(q, _repeat(k, q).transpose(2, 3)) * scale  # (1, H, t, t)
    scores = torch.tanh(scores / softcap) * softcap
    allowed = _window_mask(q.shape[2], window or q.shape[2], q.device)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, dropout, training=dropout > 0.0)
    return torch.matmul(weights, _repeat(v, q)).transpose(1, 2)  # (1, t, H, D)


def _repeat(x: Tensor, query: Tensor) -> Tensor:
    """(1, K, t, D) -> (1, H, t, D): each key head serves H/K query heads in a row."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


@lru_cache(maxsize=64)
def _window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """(t, t): a token sees itself and the window - 1 tokens before it."""
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return allowed.triu(1 - window)


AttentionInterface.register(SEGMENTS, segment_attention)
