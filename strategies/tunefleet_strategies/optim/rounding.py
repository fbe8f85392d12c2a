"""Writing updated weights back: into fp32 as they are, into half precision rounded.

bf16 keeps 8 significant bits, so a weight moves only if its update exceeds about 1/512 of it; smaller updates round
away every time. Stochastic rounding keeps them on average: it rounds up with the probability that the part cut off
says (Gupta et al., arXiv 1502.02551, section 3), so the expected weight is the exact one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic"]

_CUT_BITS = 16
"""Bits of an fp32 number that bf16 has no room for."""


def rounded(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """fp32 values in the number format of the weights.

    Args:
        generator: where the noise of stochastic rounding to bf16 comes from; None rounds to the nearest.
    """
    if generator is None or dtype != torch.bfloat16:
        return exact.to(dtype)
    noise = torch.randint(1 << _CUT_BITS, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    bits = (exact.view(torch.int32) + noise) & (-1 << _CUT_BITS)
    return bits.view(torch.float32).to(dtype)
