# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel of one token's attention over a short text: a program a query head, no parts and no merge of programs.

At a few hundred tokens nothing counts but how many steps wait for each other. So keys and values of the first block are
in registers before q is known. Each lane's share of the tokens has a running softmax of its own, so that warps meet
twice, at the end. Products are of plain float32: tensor cores would want operands passed through shared memory, and a
kernel that asks for little of it leaves the next one room to start.

Row r of a tile [BLOCK, D] is in warp r // ROWS % WARPS, because a load of 16 bytes a thread gives a warp 256 elements;
so reshaped to [·, WARPS, ROWS, D] it stays where it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.attention.triton import angles, head, norm_weights, out_of_text
from lbq.runtime.kernels.gemv.triton import store_planes

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _block(at, first, stop, D: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """Keys or values of BLOCK tokens from ``first`` on, zero from ``stop`` on: [·, WARPS, ROWS, DP]."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    ROWS: tl.constexpr = 256 // DP
    token = first + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, DP)[None, :]
    x = tl.load(at + token * D + d, mask=(token < stop) & (d < D), other=0.0)
    return x.reshape(BLOCK // (WARPS * ROWS), WARPS, ROWS, DP)


@triton.jit(do_not_specialize=["SLOTS"])
def attend_short(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    kv_ptr,
    q_out_ptr,
    s_out_ptr,
    SLOTS,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_EPS: tl.constexpr,
    K_EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    C_OUT: tl.constexpr,
    XC_OUT: tl.constexpr,
    FOLD_OUT: tl.constexpr,
    SIZE_OUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """What ``attend`` does, of a 16-bit cache and heads of whole blocks of 32; a launch is of KV_HEADS · G programs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    KIND: tl.constexpr = kv_ptr.dtype.element_ty
    DP: tl.constexpr = triton.next_power_of_2(D)
    query = tl.program_id(0)
    h = query // G
    text = tl.program_id(1)
    qkv_ptr += text * ((G + 2) * KV_HEADS * D)
    kv_ptr += text.to(tl.int64) * (2 * KV_HEADS * D) * SLOTS
    position = tl.load(position_ptr + text).to(tl.int32)
    begin = tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0
    k_at = kv_ptr + h.to(tl.int64) * SLOTS * D
    v_at = kv_ptr + (KV_HEADS + h).to(tl.int64) * SLOTS * D
    ROWS: tl.constexpr = 256 // DP
    keys = _block(k_at, begin, position, D, BLOCK, WARPS)
    values = _block(v_at, begin, position, D, BLOCK, WARPS)
    warp = tl.arange(0, WARPS)[:, None]
    d = tl.arange(0, DP)[None, :] + warp * 0  # a copy for each warp
    cos, sin = angles(cos_ptr + position * (DIMS // 2), sin_ptr + position * (DIMS // 2), d, DIMS)
    wq, wq_other = norm_weights(q_norm_ptr, d, D, DIMS, Q_EPS)
    wk, wk_other = norm_weights(k_norm_ptr, d, D, DIMS, K_EPS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    q = head(qkv_ptr + query * D, wq, wq_other, cos, sin, d, d < D, D, DIMS, Q_EPS)
    k = head(qkv_ptr + (KV_HEADS * G + h) * D, wk, wk_other, cos, sin, d, d < D, D, DIMS, K_EPS).to(KIND)
    v = tl.load(qkv_ptr + (KV_HEADS * G + KV_HEADS + h) * D + d, mask=d < D, other=0.0).to(KIND)
    once = (d < D) & (warp == 0) & (query % G == 0)
    tl.store(k_at + position * D + d, k, mask=once)
    tl.store(v_at + position * D + d, v, mask=once)

    # Every lane begins at the new token's score; the first has the token itself.
    q *= SCALE * _LOG2_E
    newest = tl.where((warp == 0) & (tl.arange(0, ROWS)[None, :] == 0), 1.0, 0.0)  # [WARPS, ROWS]
    peak = tl.sum(q * k.to(tl.float32), axis=1)[:, None] + newest * 0.0
    total = newest
    acc = v.to(tl.float32)[:, None, :] * newest[:, :, None]
    q = q[None, :, None, :]
    row = tl.arange(0, BLOCK).reshape(BLOCK // (WARPS * ROWS), WARPS, ROWS)
    for first in tl.range(begin, position, BLOCK, num_stages=1):
        scores = tl.where(first + row < position, tl.sum(keys.to(tl.float32) * q, axis=3), _LOWEST)
        keys = _block(k_at, first + BLOCK, position, D, BLOCK, WARPS)
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        shrink = tl.exp2(peak - higher)
        p = tl.exp2(scores - higher[None])
        total = total * shrink + tl.sum(p, axis=0)
        acc = acc * shrink[:, :, None] + tl.sum(values.to(tl.float32) * p[:, :, :, None], axis=0)
        values = _block(v_at, first + BLOCK, position, D, BLOCK, WARPS)
        peak = higher
    weight = tl.exp2(peak - tl.max(peak))
    out = tl.sum(tl.sum(acc * weight[:, :, None], axis=1), axis=0) / tl.sum(total * weight)
    q_at, s_at = out_of_text(text, q_out_ptr, s_out_ptr, KV_HEADS * G * D, C_OUT, XC_OUT, SIZE_OUT)
    if C_OUT > 0:
        BLOCKS: tl.constexpr = D // SIZE_OUT
        b = tl.arange(0, DP // SIZE_OUT)
        store_planes(
            out.reshape(DP // SIZE_OUT, SIZE_OUT),
            tl.where(b < BLOCKS, query * BLOCKS + b, KV_HEADS * G * BLOCKS),
            q_at,
            s_at,
            KV_HEADS * G * BLOCKS,
            XC_OUT,
            C_OUT,
            FOLD_OUT,
            DP // SIZE_OUT,
            SIZE_OUT,
        )
    else:
        e = tl.arange(0, DP)
        tl.store(s_at + query * D + e, out, mask=e < D)
