# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel of one token's attention: norm and rope of q and k, the cache's new entry, split-KV attention, merge.

After Flash-Decoding (Dao et al. 2023): the cache is cut along the tokens, programs work on the parts with a running
softmax, and what they found is merged; here by the last of a head's programs to arrive, in the order of the parts, so
that results repeat to the bit. Heads that share keys are the rows of one tile. A launch is for one text or several, of
any lengths: the second number of a program is its text.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.arrivals import arrived, let_in, take_turn
from lbq.runtime.kernels.gemv.triton import call, store_planes

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def partner(d, DIMS: tl.constexpr):
    """The element that rope turns element ``d`` of a head with; itself past the first DIMS."""
    HALF: tl.constexpr = DIMS // 2
    return tl.where(d < HALF, d + HALF, tl.where(d < DIMS, d - HALF, d))


@triton.jit
def angles(cos_ptr, sin_ptr, d, DIMS: tl.constexpr):
    """The cosine of each element's angle, and the sine that goes with its partner."""
    HALF: tl.constexpr = DIMS // 2
    angle = tl.where(d < HALF, d, d - HALF)
    sin = tl.load(sin_ptr + angle, mask=d < DIMS, other=0.0)
    return tl.load(cos_ptr + angle, mask=d < DIMS, other=1.0), tl.where(d < HALF, -sin, sin)


@triton.jit
def norm_weights(norm_ptr, d, D: tl.constexpr, DIMS: tl.constexpr, EPS: tl.constexpr):
    """The norm's weight of each element and of its partner; ones where EPS is None."""
    if EPS is None:
        own = tl.full(d.shape, 1.0, tl.float32)
        other = own
    else:
        own = tl.load(norm_ptr + d, mask=d < D, other=0.0)
        other = tl.load(norm_ptr + partner(d, DIMS), mask=d < D, other=0.0)
    return own, other


@triton.jit
def head(x_ptr, own, other, cos, sin, d, mask, D: tl.constexpr, DIMS: tl.constexpr, EPS: tl.constexpr):
    """Heads [..., D] whose first elements are at ``x_ptr``: normed unless EPS is None, the first DIMS turned.

    ``d`` [..., ·] are the elements wanted, those out of ``mask`` zero; ``own`` and ``other`` of ``norm_weights``.
    """
    x = tl.load(x_ptr + d, mask=mask, other=0.0)
    y = tl.load(x_ptr + partner(d, DIMS), mask=mask, other=0.0)
    turned = x * (own * cos) + y * (other * sin)
    if EPS is not None:
        turned *= tl.rsqrt(tl.sum(x * x, axis=len(x.shape) - 1, keep_dims=True) / D + EPS)
    return turned


@triton.jit
def part_of(split, position, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr):
    """How many parts there are, and which tokens are in this one of what is in the cache: the newest is not yet."""
    begin = tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0
    size = (position + SPLITS * BLOCK - begin) // (SPLITS * BLOCK) * BLOCK  # tokens of a part, in whole blocks
    size = tl.maximum(size, LEAST)
    start = begin + split * size
    return (position - begin) // size + 1, start, tl.minimum(start + size, position)


@triton.jit
def inside(there, d, D: tl.constexpr, DP: tl.constexpr):
    """Which elements ``d`` of tokens that are ``there`` are a head's."""
    return there if D == DP else there & (d < D)


@triton.jit
def soften(scores, there, worth, weights, peak):
    """A block's scores [GP, BLOCK] in a running softmax (Milakov & Gimelshein 2018): p, what tokens weigh so far, by
    what the old shrink, and the new peak; a token weighs its p times its ``worth``."""
    scores = tl.where(there[None, :], scores, _LOWEST)
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    shrink = tl.exp2(peak - higher)[:, None]
    p = tl.exp2(scores - higher[:, None])
    return p, weights * shrink + p * worth, shrink, higher


@triton.jit(do_not_specialize=["SLOTS"])
def attend(
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
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    TOGETHER: tl.constexpr,
    C_OUT: tl.constexpr,
    XC_OUT: tl.constexpr,
    FOLD_OUT: tl.constexpr,
    SIZE_OUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The attention of the token at ``position``, from its raw q, k and v to the planes of the output projection.

    qkv float32 [(KV_HEADS·G + 2·KV_HEADS)·D]; norms float32 [D], Q_EPS and K_EPS None where there are none; cos and sin
    float32 [≥ position + 1, DIMS/2]; the cache kv [2, KV_HEADS, SLOTS, D], a 16-bit float type; slot ``position`` is
    written. WINDOW: tokens that are seen, or 0. With PDL the first AHEAD tokens of a part are called into L2.
    Scratch: part float32 [KV_HEADS, SPLITS, G, D], peak and sum [KV_HEADS, SPLITS, G], arrivals int32 [KV_HEADS], zero
    and left so. All of these have a row for each text. Where C_OUT is 0, s_out takes the result, float32
    [KV_HEADS·G·D], in place of planes. The launch is of SPLITS × KV_HEADS programs a text whatever the position; parts
    have at least LEAST tokens, so that a short text leaves some programs nothing to do.
    """
    let_in(PDL, True)
    KIND: tl.constexpr = kv_ptr.dtype.element_ty
    GP: tl.constexpr = 16 if G < 16 else triton.next_power_of_2(G)
    DP: tl.constexpr = triton.next_power_of_2(D)
    h = tl.program_id(0) % KV_HEADS
    split = tl.program_id(0) // KV_HEADS
    text = tl.program_id(1)
    qkv_ptr += text * ((G + 2) * KV_HEADS * D)
    kv_ptr += text.to(tl.int64) * (2 * KV_HEADS * D) * SLOTS
    part_ptr += text * (KV_HEADS * SPLITS * G * D)
    peak_ptr += text * (KV_HEADS * SPLITS * G)
    sum_ptr += text * (KV_HEADS * SPLITS * G)
    position = tl.load(position_ptr + text).to(tl.int32)
    parts, start, stop = part_of(split, position, WINDOW, SPLITS, BLOCK, LEAST)
    if split >= parts:
        return
    k_slot = h.to(tl.int64) * SLOTS
    v_slot = (KV_HEADS + h).to(tl.int64) * SLOTS
    if PDL:  # what earlier steps cached can be on its way while the projection before this is at work
        used = tl.maximum(stop - start, 1) * (2 * D)
        call(kv_ptr + (k_slot + start) * D, used, AHEAD * (2 * D))
        call(kv_ptr + (v_slot + start) * D, used, AHEAD * (2 * D))
    g = tl.arange(0, GP)[:, None]
    d = tl.arange(0, DP)[None, :]
    own = (g < G) & (d < D)
    cos, sin = angles(cos_ptr + position * (DIMS // 2), sin_ptr + position * (DIMS // 2), d, DIMS)
    wq, wq_other = norm_weights(q_norm_ptr, d, D, DIMS, Q_EPS)
    wk, wk_other = norm_weights(k_norm_ptr, d, D, DIMS, K_EPS)
    take_turn(PDL, True)

    q = head(qkv_ptr + (h * G + g) * D, wq, wq_other, cos, sin, d, own, D, DIMS, Q_EPS)
    k = head(qkv_ptr + (KV_HEADS * G + h) * D, wk, wk_other, cos, sin, d, d < D, D, DIMS, K_EPS)
    v = tl.load(qkv_ptr + (KV_HEADS * G + KV_HEADS + h) * D + d, mask=d < D, other=0.0)
    newest = split == parts - 1
    q = q.to(KIND)
    k = k.to(KIND)
    v = v.to(KIND)
    tl.store(kv_ptr + (k_slot + position) * D + d, k, mask=(d < D) & newest)
    tl.store(kv_ptr + (v_slot + position) * D + d, v, mask=(d < D) & newest)

    # The newest part begins with the new token; the others with nothing.
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * (SCALE * _LOG2_E)
    peak = tl.where(newest, score, _LOWEST)  # [GP]
    acc = tl.where(newest, v.to(tl.float32), 0.0) + tl.zeros([GP, DP], dtype=tl.float32)
    n = tl.arange(0, BLOCK)
    weights = tl.where((n == 0) & newest, 1.0, 0.0)[None, :] + tl.zeros([GP, BLOCK], dtype=tl.float32)
    dk = tl.arange(0, DP)[:, None]
    k_at = kv_ptr + k_slot * D + dk
    v_at = kv_ptr + v_slot * D + d
    for n0 in tl.range(start, stop, BLOCK, num_stages=STAGES):
        token = n0 + n
        there = token < stop
        keys = tl.load(k_at + token[None, :] * D, mask=inside(there[None, :], dk, D, DP), other=0)  # [DP, BLOCK]
        values = tl.load(v_at + token[:, None] * D, mask=inside(there[:, None], d, D, DP), other=0)  # [BLOCK, DP]
        scores = tl.dot(q, keys) * (SCALE * _LOG2_E)
        p, weights, shrink, peak = soften(scores, there, 1.0, weights, peak)
        acc = tl.dot(p.to(KIND), values, acc * shrink)

    at = (h * SPLITS + split) * G
    tl.store(part_ptr + (at + g) * D + d, acc, mask=own)
    hand_in(
        peak, weights, at, part_ptr, peak_ptr, sum_ptr, qkv_ptr, arrivals_ptr, q_out_ptr, s_out_ptr, text, h, parts,
        KV_HEADS, G, D, 0, SPLITS, TOGETHER, C_OUT, XC_OUT, FOLD_OUT, SIZE_OUT,
    )  # fmt: skip


@triton.jit
def hand_in(
    peak,
    weights,
    at,
    part_ptr,
    peak_ptr,
    sum_ptr,
    signs_ptr,
    arrivals_ptr,
    q_out_ptr,
    s_out_ptr,
    text,
    h,
    parts,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    C: tl.constexpr,
    XC: tl.constexpr,
    FOLD: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Leave a part's peaks [GP] and the sums of its weights [GP, BLOCK] beside it, from row ``at`` on; the last of the
    parts to arrive merges them: see ``merge``."""
    row = tl.arange(0, peak.shape[0])
    tl.store(peak_ptr + at + row, peak, mask=row < G)
    tl.store(sum_ptr + at + row, tl.sum(weights, axis=1), mask=row < G)
    if arrived(arrivals_ptr, text * KV_HEADS + h, parts):
        q_at, s_at = out_of_text(text, q_out_ptr, s_out_ptr, KV_HEADS * G * D, C, XC, SIZE)
        merge(
            part_ptr, peak_ptr, sum_ptr, signs_ptr, q_at, s_at, h, parts,
            KV_HEADS, G, D, TURNED, SPLITS, TOGETHER, C, XC, FOLD, SIZE,
        )  # fmt: skip


@triton.jit
def load_signs(signs_ptr, first, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr):
    """WIDTH columns from ``first`` on of signs float16 [D, D]: [DP, WP], zero past their ends."""
    e = tl.arange(0, DP)[:, None]
    d = tl.arange(0, WP)[None, :]
    return tl.load(signs_ptr + e * D + first + d, mask=(e < D) & (d < WIDTH), other=0.0)


@triton.jit
def turn(x, signs):
    """Rows [·, DP] times ``signs`` [T, ·], T elements at a time, in float32: where T is less than DP, equal blocks of
    signs lie along the diagonal."""
    ROWS: tl.constexpr = x.shape[0]
    TIMES: tl.constexpr = x.shape[1] // signs.shape[0]
    y = tl.dot(x.reshape(ROWS * TIMES, signs.shape[0]), signs)
    return y.reshape(ROWS, TIMES * signs.shape[1])


@triton.jit
def out_of_text(text, q_ptr, s_ptr, N: tl.constexpr, C: tl.constexpr, XC: tl.constexpr, SIZE: tl.constexpr):
    """Where the planes of ``text`` and their scales begin, of vectors [N]; where C is 0, the vectors at ``s_ptr``."""
    return q_ptr + text * (2 * (C // 4) * XC), s_ptr + text * (N // SIZE if C > 0 else N)


@triton.jit
def merge(
    part_ptr,
    peak_ptr,
    sum_ptr,
    signs_ptr,
    q_out_ptr,
    s_out_ptr,
    h,
    parts,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TURNED: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    C: tl.constexpr,
    XC: tl.constexpr,
    FOLD: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The parts of the heads that share keys ``h`` into planes of whole blocks of SIZE. If TURNED, they are times signs
    and each is a sum of TURNED.

    Each load is on its way before any is waited for, as far as TOGETHER parts at a time fit the registers.
    """
    GP: tl.constexpr = 16 if TURNED and G < 16 else triton.next_power_of_2(G)
    DP: tl.constexpr = triton.next_power_of_2(D)
    part = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None]
    g = tl.arange(0, GP)[None, :]
    row = (h * SPLITS + part) * G + g
    there = (part < parts) & (g < G)
    peaks = tl.load(peak_ptr + row, mask=there, other=_LOWEST, cache_modifier=".cg")
    sums = tl.load(sum_ptr + row, mask=there, other=0.0, cache_modifier=".cg")
    peak = tl.max(tl.where(g < G, peaks, 0.0), axis=0)
    total = tl.sum(tl.where(there, sums * tl.exp2(peaks - peak[None, :]), 0.0), axis=0)
    row = tl.arange(0, TOGETHER * GP)
    d = tl.arange(0, DP)[None, :]
    highest = (peak[None, :] + tl.zeros([TOGETHER, GP], dtype=tl.float32)).reshape(TOGETHER * GP)
    out = tl.zeros([TOGETHER * GP, DP], dtype=tl.float32)
    for first in tl.static_range(0, SPLITS, TOGETHER):
        there = (first + row // GP < parts) & (row % GP < G)
        at = (h * SPLITS + first + row // GP) * G + row % GP
        found = tl.load(part_ptr + at[:, None] * D + d, mask=there[:, None] & (d < D), other=0.0, cache_modifier=".cg")
        peaks = tl.load(peak_ptr + at, mask=there, other=_LOWEST, cache_modifier=".cg")
        out += found * tl.exp2(peaks - highest)[:, None]
    out = tl.sum(out.reshape(TOGETHER, GP, DP), axis=0)
    g = tl.arange(0, GP)[:, None]
    out /= tl.where(g < G, tl.reshape(total, (GP, 1)), 1.0)
    if TURNED:
        out = tl.dot(out.to(tl.float16), load_signs(signs_ptr, 0, D, D, DP, DP)) / TURNED
    if C > 0:
        # Where heads are padded, they are whole blocks; else whatever is whole in all of them.
        IN_HEAD: tl.constexpr = 1 if D == DP else D // SIZE
        PADDED: tl.constexpr = 1 if D == DP else DP // SIZE
        b = tl.arange(0, GP * DP // SIZE)
        block = b // PADDED * IN_HEAD + b % PADDED
        used = (block < G * D // SIZE) & (b % PADDED < IN_HEAD)
        store_planes(
            out.reshape(GP * DP // SIZE, SIZE),
            tl.where(used, h * (G * D // SIZE) + block, KV_HEADS * G * D // SIZE),
            q_out_ptr,
            s_out_ptr,
            KV_HEADS * G * D // SIZE,
            XC,
            C,
            FOLD,
            GP * DP // SIZE,
            SIZE,
        )
    else:
        tl.store(s_out_ptr + (h * G + g) * D + d, out, mask=(g < G) & (d < D))
