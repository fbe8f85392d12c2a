"""Attention over segments on a GPU: the variable-length kernel computes what each segment alone gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunefleet.training.attention import segment_attention, segment_kwargs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

LENGTHS = [1, 40, 7, 129]


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_computes_what_fp32_does_segment_by_segment(key_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(LENGTHS), 16, device="cuda") for heads in (4, key_heads, key_heads)]
    exact, exact_gradients = attended(states, window)
    # As a rotary model under autocast has it: queries and keys in fp32, values in bf16.
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found, gradients = attended([states[0], states[1], states[2].bfloat16()], window)
    assert found.dtype == torch.bfloat16
    assert distance(found, exact) < 1e-2
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert distance(gradient, expected) < 2e-2


def attended(states: list[Tensor], window: int | None) -> tuple[Tensor, list[Tensor]]:
    """The output, and what its squares' sum hands back to queries, keys and values."""
    query, key, value = leaves = [state.detach().requires_grad_() for state in states]
    lengths = segment_kwargs(LENGTHS, torch.device("cuda"))
    output, _ = segment_attention(nn.Identity(), query, key, value, None, sliding_window=window, **lengths)
    output.float().square().sum().backward()
    return output, [leaf.grad for leaf in leaves if leaf.grad is not None]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).detach().norm() / expected.detach().norm())
