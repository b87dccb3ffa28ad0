"""A few tokens' product with packed weights in one pass over the weights, on int8 tensor cores: see ``triton``.

As in ``gemv`` activations are two int8 planes and sums under one scale exact; but one scale is for the 128 elements (64
before INT8) that a tensor core adds at once, not for 32.
"""

from __future__ import annotations

import torch
from triton import cdiv, next_power_of_2

from lbq.runtime.kernels.batch import triton as kernels
from lbq.runtime.kernels.gemv import ArrangedWeight, Planes, quantize, sm_count
from lbq.runtime.kernels.gemv.triton import INTERPRETED

__all__ = ["TOKENS", "batch", "planes", "warps_for", "why_not"]

TOKENS = 16
WARPS_A_PROCESSOR = 16  # with two rows of four words each under way, enough to hide memory's latency


def tile_codes(bits: int) -> int:
    """Codes of a row that are added before a scale is applied."""
    return 16 * 32 // bits


def why_not(weight: ArrangedWeight) -> str | None:
    """Why this kernel cannot serve ``weight``, or None where it can."""
    if weight.bits == 3:
        return "3-bit codes"
    if weight.group != weight.k and weight.group % tile_codes(weight.bits):
        return f"groups of {weight.group}, no multiple of {tile_codes(weight.bits)}"
    return None


def planes(x: torch.Tensor, bits: int) -> Planes:
    """Float [M, K] as ``batch`` reads it."""
    return quantize(x, bits, tile_codes(bits))


def warps_for(n: int, k: int, bits: int, sm_count: int) -> int:
    """Warps that share the 16 rows of a program."""
    wanted = next_power_of_2(cdiv(WARPS_A_PROCESSOR * sm_count * 16, n))
    return int(max(1, min(8, wanted, next_power_of_2(cdiv(k, tile_codes(bits)) + 1) // 2)))


def batch(
    x: Planes, weight: ArrangedWeight, bias: torch.Tensor | None = None, *, warps: int | None = None
) -> torch.Tensor:
    """W·x + bias for up to TOKENS tokens: float32 [M, N]. ``bias`` is float32 [N]; ``why_not(weight)`` must be None."""
    assert why_not(weight) is None
    assert (x.bits, x.k, x.block) == (weight.bits, weight.k, tile_codes(weight.bits))
    m, n = x.q.shape[0], weight.n
    assert m <= TOKENS
    assert bias is None or (bias.shape == (n,) and bias.dtype == torch.float32)
    y = torch.empty((m, n), dtype=torch.float32, device=weight.words.device)
    warps = warps or warps_for(n, weight.k, weight.bits, sm_count(weight.words.device))
    kernels.batch[(cdiv(n, 16),)](
        weight.words,
        weight.scales,
        x.q,
        x.scales,
        y if bias is None else bias,
        y,
        n,
        m,
        K=weight.k,
        G=weight.group,
        BITS=weight.bits,
        XC=x.q.shape[3],
        FOURS=cdiv(m, 4),
        S=warps,
        HAS_BIAS=bias is not None,
        EMULATE=INTERPRETED,
        num_warps=warps,
    )
    return y
