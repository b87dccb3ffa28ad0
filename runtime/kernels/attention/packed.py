# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel of one token's attention to keys and values kept in few bits: what ``triton.attend`` is for 16.

Keys are never opened. q, turned as they are, becomes two planes of int8, and its products with codes are exact integers
(``mma.m16n8k32``). Values are loaded as pairs of bytes, which tensor cores' loads can transpose, and opened two at a
time: by conversions, sixteen a cycle, that would take longer than reading them. A value's scale joins the exponent of
its token's score, so that what p · code sums to is in float16's range whatever the scales; a token weighs p / scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.arrivals import let_in, take_turn
from lbq.runtime.kernels.attention.triton import (
    _LOG2_E,
    _LOWEST,
    angles,
    hand_in,
    head,
    inside,
    load_signs,
    norm_weights,
    part_of,
    soften,
    turn,
)
from lbq.runtime.kernels.gemv.triton import _INFINITY, _TINY, call
from lbq.runtime.turn import LARGEST as _LARGEST

LARGEST = tl.constexpr(_LARGEST)
# Of two pairs of int8 the first and the second ones as float16: a byte with its sign bit turned, under the exponent of
# 1024, is 1152 + its value.
_OPEN_EIGHTS = tl.constexpr("""
{
.reg .b32 offset;
mov.b32 offset, 0x64806480;
lop3.b32 $0, $2, 0x00FF00FF, offset, 0x6A;
prmt.b32 $1, $2, 0, 0x4341;
xor.b32 $1, $1, offset;
sub.f16x2 $0, $0, offset;
sub.f16x2 $1, $1, offset;
}
""")
# Of two pairs of bytes the low nibbles of the first and of the second ones, then the high ones, less 8 each: under the
# exponent of 1024 a low nibble is 1024 + its value, and a high one 1024 + 16 times it.
_OPEN_FOURS = tl.constexpr("""
{
.reg .b32 other, base, offset, part, less;
mov.b32 base, 0x64006400;
mov.b32 offset, 0x64086408;
mov.b32 part, 0x2C002C00;
mov.b32 less, 0xD480D480;
shr.u32 other, $4, 8;
lop3.b32 $0, $4, 0x000F000F, base, 0xEA;
lop3.b32 $1, other, 0x000F000F, base, 0xEA;
lop3.b32 $2, $4, 0x00F000F0, base, 0xEA;
lop3.b32 $3, other, 0x00F000F0, base, 0xEA;
sub.f16x2 $0, $0, offset;
sub.f16x2 $1, $1, offset;
fma.rn.f16x2 $2, $2, part, less;
fma.rn.f16x2 $3, $3, part, less;
}
""")
# Of four bytes the low and the high nibbles, less 8 each and times 16, as int8.
_SPLIT_FOURS = tl.constexpr("""
{
.reg .b32 sign;
mov.b32 sign, 0x80808080;
shl.b32 $0, $2, 4;
lop3.b32 $0, $0, 0xF0F0F0F0, sign, 0x6A;
lop3.b32 $1, $2, 0xF0F0F0F0, sign, 0x6A;
}
""")


@triton.jit
def _scale(x, MOST: tl.constexpr):
    """The scales of rows, |x| ≤ MOST · scale: [·, 1], above zero, NaN for rows with a NaN or an infinity."""
    finite = tl.abs(x) < _INFINITY
    peak = tl.max(tl.where(finite, tl.abs(x), _INFINITY), axis=1, keep_dims=True)
    return tl.where(peak < _INFINITY, tl.maximum(peak / MOST, _TINY), float("nan"))


@triton.jit
def eight(x):
    """Rows as int8 and their scales: [·, 1]."""
    scale = _scale(x, 127.0)
    return tl.floor(x / scale + 0.5).to(tl.int8), scale


@triton.jit
def four(low, high):
    """Rows of two halves, of small integers from −7 to 7 in float32, and their scales: [·, 1]."""
    scale = tl.maximum(_scale(low, 7.0), _scale(high, 7.0), propagate_nan=tl.PropagateNan.ALL)
    return tl.floor(low / scale + 0.5), tl.floor(high / scale + 0.5), scale


@triton.jit
def nibbles(low, high):
    """Small integers in float32 as bytes of two."""
    return ((low + 8.0).to(tl.int32) | ((high + 8.0).to(tl.int32) << 4)).to(tl.uint8)


@triton.jit
def _planes(x):
    """Rows as two planes of int8 and their scales: x = scale · (254 · first + second), to 2⁻¹⁶ of a row's largest."""
    scale = _scale(x, 127.0)
    x = x / scale
    first = tl.floor(x + 0.5)
    second = tl.floor((x - first) * 254.0 + 0.5)
    return first.to(tl.int8), second.to(tl.int8), scale / 254.0


@triton.jit
def _times(first, second, codes):
    """Both planes with codes [·, BLOCK], exactly, in float32."""
    return (tl.dot(first, codes) * 254 + tl.dot(second, codes)).to(tl.float32)


@triton.jit
def _log2(x, EMULATE: tl.constexpr):
    """By one instruction, to 2⁻²²."""
    if EMULATE:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _open_eights(pairs, EMULATE: tl.constexpr):
    """int16 of two int8 each: the first and the second ones as float16."""
    if EMULATE:
        first = ((pairs << 8) >> 8).to(tl.float16)
        second = (pairs >> 8).to(tl.float16)
    else:
        first, second = tl.inline_asm_elementwise(
            _OPEN_EIGHTS, "=&r,=&r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return first, second


@triton.jit
def _open_fours(pairs, EMULATE: tl.constexpr):
    """int16 of two bytes each: the low nibbles of the first and of the second, then the high ones, as float16."""
    if EMULATE:
        x = pairs.to(tl.int32)
        a = ((x & 15) - 8).to(tl.float16)
        b = (((x >> 8) & 15) - 8).to(tl.float16)
        c = (((x >> 4) & 15) - 8).to(tl.float16)
        d = (((x >> 12) & 15) - 8).to(tl.float16)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _OPEN_FOURS,
            "=&r,=&r,=&r,=&r,r",
            [pairs],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def _split_fours(codes, EMULATE: tl.constexpr):
    """Bytes of two nibbles: the low and the high ones, each less 8 and times 16, as int8."""
    if EMULATE:
        x = codes.to(tl.int32)
        low = (((x & 15) - 8) * 16).to(tl.int8)
        high = ((((x >> 4) & 15) - 8) * 16).to(tl.int8)
    else:
        low, high = tl.inline_asm_elementwise(
            _SPLIT_FOURS, "=&r,=&r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low, high


@triton.jit(do_not_specialize=["SLOTS"])
def attend_packed(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    kv_ptr,
    kv_scale_ptr,
    units_ptr,
    signs_ptr,
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
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """``triton.attend`` but for the cache: kv [2, KV_HEADS, SLOTS, D·BITS/8], kv_scale float32 [2, KV_HEADS, SLOTS].

    Keys are over units float32 [KV_HEADS, D] and times signs float16 [D, D], of which each is a sum of SIZE. At 8 bits
    codes are int8. At 4 bits values are times signs too; a byte has element d, plus 8, in its low nibble and element
    D/2 + d in its high one.
    """
    let_in(PDL, True)
    GP: tl.constexpr = 16 if G < 16 else triton.next_power_of_2(G)
    LEAST_D: tl.constexpr = 32 * (8 // BITS)  # what an instruction of tensor cores multiplies
    DP: tl.constexpr = LEAST_D if D < LEAST_D else triton.next_power_of_2(D)
    W: tl.constexpr = D * BITS // 8
    WP: tl.constexpr = DP * BITS // 8
    h = tl.program_id(0) % KV_HEADS
    split = tl.program_id(0) // KV_HEADS
    text = tl.program_id(1)
    qkv_ptr += text * ((G + 2) * KV_HEADS * D)
    kv_ptr += text.to(tl.int64) * (2 * KV_HEADS * W) * SLOTS
    kv_scale_ptr += text.to(tl.int64) * (2 * KV_HEADS) * SLOTS
    part_ptr += text * (KV_HEADS * SPLITS * G * D)
    peak_ptr += text * (KV_HEADS * SPLITS * G)
    sum_ptr += text * (KV_HEADS * SPLITS * G)
    position = tl.load(position_ptr + text).to(tl.int32)
    parts, start, stop = part_of(split, position, WINDOW, SPLITS, BLOCK, LEAST)
    if split >= parts:
        return
    k_slot = h.to(tl.int64) * SLOTS
    v_slot = (KV_HEADS + h).to(tl.int64) * SLOTS
    if PDL:
        used = tl.maximum(stop - start, 1) * W
        call(kv_ptr + (k_slot + start) * W, used, AHEAD * W)
        call(kv_ptr + (v_slot + start) * W, used, AHEAD * W)
    g = tl.arange(0, GP)[:, None]
    d = tl.arange(0, DP)[None, :]
    w = tl.arange(0, WP)[None, :]
    cos, sin = angles(cos_ptr + position * (DIMS // 2), sin_ptr + position * (DIMS // 2), d, DIMS)
    wq, wq_other = norm_weights(q_norm_ptr, d, D, DIMS, Q_EPS)
    wk, wk_other = norm_weights(k_norm_ptr, d, D, DIMS, K_EPS)
    units = tl.load(units_ptr + h * D + d, mask=d < D, other=1.0)
    if BITS == 8:
        T: tl.constexpr = DP if DP < LARGEST else LARGEST
        signs = load_signs(signs_ptr, 0, D, D, T, T)
    else:
        signs = load_signs(signs_ptr, 0, W, D, DP, WP)
        high_signs = load_signs(signs_ptr, W, W, D, DP, WP)
    take_turn(PDL, True)

    q = head(qkv_ptr + (h * G + g) * D, wq, wq_other, cos, sin, d, (g < G) & (d < D), D, DIMS, Q_EPS)
    k = head(qkv_ptr + (KV_HEADS * G + h) * D, wk, wk_other, cos, sin, d, d < D, D, DIMS, K_EPS)
    v = tl.load(qkv_ptr + (KV_HEADS * G + KV_HEADS + h) * D + d, mask=d < D, other=0.0)
    newest = split == parts - 1
    once = newest & (g == 0)  # k and v stand in all rows
    q = (q * units).to(tl.float16)
    k = (k / units + g * 0.0).to(tl.float16)
    v += g * 0.0
    q_first, q_second, q_scale = _planes(turn(q, signs) * (SCALE * _LOG2_E / SIZE))
    if BITS == 8:
        k, new_k_scale = eight(turn(k, signs))
        v, new_v_scale = eight(v)
        k_bytes = k
        v_bytes = v
        score = _exactly(q_first, q_second, q_scale, k)
    else:
        high_first, high_second, high_scale = _planes(tl.dot(q, high_signs) * (SCALE * _LOG2_E / SIZE))
        k, high_k, new_k_scale = four(tl.dot(k, signs), tl.dot(k, high_signs))
        v = v.to(tl.float16)
        v, high_v, new_v_scale = four(tl.dot(v, signs), tl.dot(v, high_signs))
        k_bytes = nibbles(k, high_k)
        v_bytes = nibbles(v, high_v)
        score = _exactly(q_first, q_second, q_scale, k) + _exactly(high_first, high_second, high_scale, high_k)
        q_scale /= 16.0  # of the codes of keys as they are split
        high_scale /= 16.0
    tl.store(kv_ptr + (k_slot + position) * W + w + g * 0, k_bytes, mask=(w < W) & once)
    tl.store(kv_ptr + (v_slot + position) * W + w + g * 0, v_bytes, mask=(w < W) & once)
    tl.store(kv_scale_ptr + k_slot + position + g * 0, new_k_scale, mask=once)
    tl.store(kv_scale_ptr + v_slot + position + g * 0, new_v_scale, mask=once)

    # The newest part begins with the new token; the others with nothing.
    peak = tl.where(newest, tl.sum(score * new_k_scale + tl.log2(new_v_scale), axis=1), _LOWEST)  # [GP]
    n = tl.arange(0, BLOCK)
    weights = tl.where((n == 0)[None, :] & newest, 1.0 / new_v_scale, 0.0)
    even, odd = tl.split(tl.where(newest, v.to(tl.float32), 0.0).reshape(GP, WP // 2, 2))
    if BITS == 4:
        high_even, high_odd = tl.split(tl.where(newest, high_v, 0.0).reshape(GP, WP // 2, 2))
    wk_at = tl.arange(0, WP)[:, None]
    pair = tl.arange(0, WP // 2)[None, :]
    k_at = kv_ptr + k_slot * W + wk_at
    v_at = kv_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + v_slot * (W // 2) + pair
    for n0 in tl.range(start, stop, BLOCK, num_stages=STAGES):
        token = n0 + n
        there = token < stop
        keys = tl.load(k_at + token[None, :] * W, mask=inside(there[None, :], wk_at, W, WP), other=0)
        values = tl.load(v_at + token[:, None] * (W // 2), mask=inside(there[:, None], 2 * pair, W, WP), other=0)
        k_scale = tl.load(kv_scale_ptr + k_slot + token, mask=there, other=0.0)[None, :]
        v_scale = _log2(tl.load(kv_scale_ptr + v_slot + token, mask=there, other=1.0)[None, :], EMULATE)
        if BITS == 8:
            scores = _times(q_first, q_second, keys) * (q_scale * k_scale) + v_scale
        else:
            keys, high_keys = _split_fours(keys, EMULATE)
            scores = _times(q_first, q_second, keys) * q_scale + _times(high_first, high_second, high_keys) * high_scale
            scores = scores * k_scale + v_scale
        p, weights, shrink, peak = soften(scores, there, tl.exp2(-v_scale), weights, peak)
        p = p.to(tl.float16)
        if BITS == 8:
            first, second = _open_eights(values, EMULATE)
        else:
            first, second, third, fourth = _open_fours(values, EMULATE)
            high_even = tl.dot(p, third, high_even * shrink)
            high_odd = tl.dot(p, fourth, high_odd * shrink)
        even = tl.dot(p, first, even * shrink)
        odd = tl.dot(p, second, odd * shrink)

    at = (h * SPLITS + split) * G
    own = (g < G) & (w < W)
    tl.store(part_ptr + (at + g) * D + w, tl.join(even, odd).reshape(GP, WP), mask=own)
    if BITS == 4:
        tl.store(part_ptr + (at + g) * D + W + w, tl.join(high_even, high_odd).reshape(GP, WP), mask=own)
    hand_in(
        peak, weights, at, part_ptr, peak_ptr, sum_ptr, signs_ptr, arrivals_ptr, q_out_ptr, s_out_ptr, text, h, parts,
        KV_HEADS, G, D, SIZE if BITS == 4 else 0, SPLITS, TOGETHER, C_OUT, XC_OUT, FOLD_OUT, SIZE_OUT,
    )  # fmt: skip


@triton.jit
def _exactly(first, second, scale, codes):
    """Scores [GP, 1] of codes that stand in all rows."""
    x = first.to(tl.float32) * 254.0 + second.to(tl.float32)
    return tl.sum(x * codes.to(tl.float32), axis=1, keep_dims=True) * scale
