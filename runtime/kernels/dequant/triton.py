# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel that opens rows of a packed matrix into 16 bits or float32."""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.gemv.triton import open_codes


@triton.jit(do_not_specialize=["ROWS", "GROUPS"])
def dequantize(
    w_ptr,
    s_ptr,
    norm_ptr,
    out_ptr,
    ROWS,
    K,
    WORDS,
    GROUPS,
    G: tl.constexpr,
    BITS: tl.constexpr,
    RELATIVE: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """out[n, k] = (code − 2^(BITS−1)) · s[n, k // G], over norm[n] if RELATIVE; out [ROWS, K] of any float type.

    w is as gemv/triton.py's kernels read it: WORDS words a row, at 3 bits three runs of them; s [ROWS, GROUPS], and G 0
    where a row has one scale. A word is loaded once, with the scale of its codes, and spread over the 4, 8 or 32
    elements that it holds: what a thread stores at once, 16 bytes in 16 bits, comes from one word or two.
    """
    C: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    there = (rows < ROWS)[:, None] & (word < WORDS)[None, :]
    i = tl.arange(0, C)[None, None, :]
    if BITS == 3:
        at = w_ptr + rows[:, None] * (3 * WORDS) + word[None, :]
        w0 = tl.load(at, mask=there, other=0)
        w1 = tl.load(at + WORDS, mask=there, other=0)
        w2 = tl.load(at + 2 * WORDS, mask=there, other=0)
        seventh = open_codes(w0, w1, w2, 6, 3, True)
        eighth = open_codes(w0, w1, w2, 7, 3, True)
        w3 = seventh | ((eighth >> 3) & 0x1C1C1C1C)
        pair = i % 8 // 2
        first = tl.where(pair == 0, w0[:, :, None], w1[:, :, None])
        second = tl.where(pair == 2, w2[:, :, None], w3[:, :, None])
        field = tl.where(pair < 2, first, second) >> (i // 8 * 8 + 5 - 3 * (i % 2))
        code = ((field & 7) ^ 4) - 4
    else:
        w = tl.load(w_ptr + rows[:, None] * WORDS + word[None, :], mask=there, other=0)
        code = ((w[:, :, None] >> (i * BITS)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
    if G:
        group = tl.minimum(word * C // G, GROUPS - 1)
        scale = tl.load(s_ptr + rows[:, None] * GROUPS + group[None, :], mask=there, other=0.0).to(tl.float32)
    else:
        scale = tl.load(s_ptr + rows, mask=rows < ROWS, other=0.0).to(tl.float32)[:, None]
    if RELATIVE:
        norm = tl.load(norm_ptr + rows, mask=rows < ROWS, other=1.0).to(tl.float32)
        scale = scale * tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)[:, None]
    value = code.to(tl.float32) * scale[:, :, None]
    value = tl.reshape(value, (BN, BW * C)).to(out_ptr.dtype.element_ty)
    e = tl.program_id(1) * (BW * C) + tl.arange(0, BW * C)
    tl.store(out_ptr + rows[:, None] * K + e[None, :], value, mask=(rows < ROWS)[:, None] & (e < K)[None, :])
