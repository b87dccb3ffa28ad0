# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel that opens a tile of rows of a packed matrix into a scratch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize(
    w_ptr,
    s_ptr,
    norm_ptr,
    out_ptr,
    ROWS,
    K,
    G,
    BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[n, k] = (code − 2^(BITS−1)) · s[n, k // G], over norm[n] if RELATIVE; out [ROWS, K] of any float type.

    w is as gemv/triton.py's kernels read it. Threads of a word load it together, so the loads coalesce; stores set
    the pace.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    e = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    inside = (rows < ROWS)[:, None] & (e < K)
    if BITS == 3:
        columns = (K + 31) // 32
        w = w_ptr + rows[:, None] * (3 * columns) + e // 32
        first_bit = e % 32 // 8 * 8
        low = tl.load(w + e % 8 // 4 * columns, mask=inside, other=0) >> (first_bit + e % 4 * 2)
        high = tl.load(w + 2 * columns, mask=inside, other=0) >> (e % 32)
        code = (low & 3) - (high & 1) * 4
    else:
        C: tl.constexpr = 32 // BITS
        w = tl.load(w_ptr + rows[:, None] * ((K + C - 1) // C) + e // C, mask=inside, other=0)
        code = ((w >> (e % C * BITS)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
    scale = tl.load(s_ptr + rows[:, None] * (K // G) + e // G, mask=inside, other=0.0).to(tl.float32)
    if RELATIVE:
        norm = tl.load(norm_ptr + rows, mask=rows < ROWS, other=1.0)
        scale = scale * tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)[:, None]
    value = code.to(tl.float32) * scale
    tl.store(out_ptr + rows[:, None] * K + e, value.to(out_ptr.dtype.element_ty), mask=inside)
