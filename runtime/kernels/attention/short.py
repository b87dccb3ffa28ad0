# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel of one token's attention over a short text, by programs of one query head and one part of the tokens.

At a few hundred tokens nothing counts but how many steps wait for each other. So a program's keys and values are in
registers before q is known, and a part is as short as a block. Each lane's share of the tokens has a running softmax of
its own, so that warps meet twice, at the end. Products are of plain float32: tensor cores would want operands passed
through shared memory, and a kernel that asks for little of it leaves the next one room to start. The last of a head's
programs to arrive merges the parts, in their order and in one step.

Row r of a tile [BLOCK, D] is in warp r // ROWS % WARPS, because a load of 16 bytes a thread gives a warp 256 elements;
so reshaped to [·, WARPS, ROWS, D] it stays where it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.arrivals import arrived, let_in, take_turn
from lbq.runtime.kernels.attention.triton import _LOG2_E, _LOWEST, angles, head, norm_weights, out_of_text
from lbq.runtime.kernels.gemv.triton import store_planes


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
    part_ptr,
    peak_ptr,
    sum_ptr,
    arrivals_ptr,
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
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    C_OUT: tl.constexpr,
    XC_OUT: tl.constexpr,
    FOLD_OUT: tl.constexpr,
    SIZE_OUT: tl.constexpr,
    PDL: tl.constexpr,
    ONWARD: tl.constexpr,
):
    """What ``attend`` does, of a 16-bit cache and heads of whole blocks of 32, on KV_HEADS · G · PARTS programs a text.

    Scratch: part float32 [texts, KV_HEADS·G, PARTS, D], peak and sum [texts, KV_HEADS·G, PARTS], arrivals int32 [texts,
    KV_HEADS·G], zero and left so. Parts are of whole blocks, the first ones full; programs without a part end at once.
    """
    let_in(PDL, ONWARD)
    KIND: tl.constexpr = kv_ptr.dtype.element_ty
    DP: tl.constexpr = triton.next_power_of_2(D)
    HEADS: tl.constexpr = KV_HEADS * G
    query = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS
    h = query // G
    text = tl.program_id(1)
    position = tl.load(position_ptr + text).to(tl.int32)
    begin = tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0
    size = tl.maximum((position - begin + PARTS * BLOCK - 1) // (PARTS * BLOCK), 1) * BLOCK  # tokens of a part
    parts = tl.maximum((position - begin + size - 1) // size, 1)
    if part >= parts:
        return
    start = begin + part * size
    stop = tl.minimum(start + size, position)  # of what is in the cache: the new token is at hand
    qkv_ptr += text * ((G + 2) * KV_HEADS * D)
    kv_ptr += text.to(tl.int64) * (2 * KV_HEADS * D) * SLOTS
    k_at = kv_ptr + h.to(tl.int64) * SLOTS * D
    v_at = kv_ptr + (KV_HEADS + h).to(tl.int64) * SLOTS * D
    ROWS: tl.constexpr = 256 // DP
    keys = _block(k_at, start, stop, D, BLOCK, WARPS)
    values = _block(v_at, start, stop, D, BLOCK, WARPS)
    warp = tl.arange(0, WARPS)[:, None]
    d = tl.arange(0, DP)[None, :] + warp * 0  # a copy for each warp
    cos, sin = angles(cos_ptr + position * (DIMS // 2), sin_ptr + position * (DIMS // 2), d, DIMS)
    wq, wq_other = norm_weights(q_norm_ptr, d, D, DIMS, Q_EPS)
    wk, wk_other = norm_weights(k_norm_ptr, d, D, DIMS, K_EPS)
    take_turn(PDL, ONWARD)

    q = head(qkv_ptr + query * D, wq, wq_other, cos, sin, d, d < D, D, DIMS, Q_EPS)
    k = head(qkv_ptr + (HEADS + h) * D, wk, wk_other, cos, sin, d, d < D, D, DIMS, K_EPS).to(KIND)
    v = tl.load(qkv_ptr + (HEADS + KV_HEADS + h) * D + d, mask=d < D, other=0.0).to(KIND)
    once = (d < D) & (warp == 0) & (query % G == 0) & (part == 0)
    tl.store(k_at + position * D + d, k, mask=once)
    tl.store(v_at + position * D + d, v, mask=once)

    # Every lane begins at the new token's score; the first of the first part has the token itself.
    q *= SCALE * _LOG2_E
    newest = tl.where((warp == 0) & (tl.arange(0, ROWS)[None, :] == 0) & (part == 0), 1.0, 0.0)  # [WARPS, ROWS]
    peak = tl.sum(q * k.to(tl.float32), axis=1)[:, None] + newest * 0.0
    total = newest
    acc = v.to(tl.float32)[:, None, :] * newest[:, :, None]
    q = q[None, :, None, :]
    row = tl.arange(0, BLOCK).reshape(BLOCK // (WARPS * ROWS), WARPS, ROWS)
    for first in tl.range(start, stop, BLOCK, num_stages=1):
        scores = tl.where(first + row < stop, tl.sum(keys.to(tl.float32) * q, axis=3), _LOWEST)
        keys = _block(k_at, first + BLOCK, stop, D, BLOCK, WARPS)
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        shrink = tl.exp2(peak - higher)
        p = tl.exp2(scores - higher[None])
        total = total * shrink + tl.sum(p, axis=0)
        acc = acc * shrink[:, :, None] + tl.sum(values.to(tl.float32) * p[:, :, :, None], axis=0)
        values = _block(v_at, first + BLOCK, stop, D, BLOCK, WARPS)
        peak = higher
    top = tl.max(peak)
    weight = tl.exp2(peak - top)
    e = tl.arange(0, DP)
    of_head = text * HEADS + query
    at = of_head * PARTS + part
    tl.store(part_ptr + at * D + e, tl.sum(tl.sum(acc * weight[:, :, None], axis=1), axis=0), mask=e < D)
    tl.store(peak_ptr + at, top)
    tl.store(sum_ptr + at, tl.sum(total * weight))
    if arrived(arrivals_ptr, of_head, parts):
        out = _merged(part_ptr, peak_ptr, sum_ptr, of_head, parts, D, PARTS)
        _hand_on(out, query, text, q_out_ptr, s_out_ptr, HEADS, D, C_OUT, XC_OUT, FOLD_OUT, SIZE_OUT)


@triton.jit
def _merged(part_ptr, peak_ptr, sum_ptr, of_head, parts, D: tl.constexpr, PARTS: tl.constexpr):
    """The first ``parts`` of a head as one: [DP]."""
    i = tl.arange(0, PARTS)
    e = tl.arange(0, triton.next_power_of_2(D))
    at = of_head * PARTS + i
    there = (i < parts)[:, None] & (e < D)[None, :]
    peaks = tl.load(peak_ptr + at, mask=i < parts, other=_LOWEST, cache_modifier=".cg")
    sums = tl.load(sum_ptr + at, mask=i < parts, other=0.0, cache_modifier=".cg")
    found = tl.load(part_ptr + at[:, None] * D + e[None, :], mask=there, other=0.0, cache_modifier=".cg")
    weight = tl.exp2(peaks - tl.max(peaks))
    return tl.sum(found * weight[:, None], axis=0) / tl.sum(sums * weight)


@triton.jit
def _hand_on(
    out,
    query,
    text,
    q_ptr,
    s_ptr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    XC: tl.constexpr,
    FOLD: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The result of one head, [DP], as planes, or as it is where C is 0."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    q_at, s_at = out_of_text(text, q_ptr, s_ptr, HEADS * D, C, XC, SIZE)
    if C > 0:
        BLOCKS: tl.constexpr = D // SIZE
        b = tl.arange(0, DP // SIZE)
        store_planes(
            out.reshape(DP // SIZE, SIZE),
            tl.where(b < BLOCKS, query * BLOCKS + b, HEADS * BLOCKS),
            q_at,
            s_at,
            HEADS * BLOCKS,
            XC,
            C,
            FOLD,
            DP // SIZE,
            SIZE,
        )
    else:
        e = tl.arange(0, DP)
        tl.store(s_at + query * D + e, out, mask=e < D)
