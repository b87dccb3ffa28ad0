# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels around a prompt's products: the norms, what is done to heads, the gate, and causal attention.

A product's operand is float16 under one float32 unit a token; its result float16 under that unit and one factor an
output, or float32 under none. See ``__init__`` for why.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.attention.packed import LARGEST, eight, four, nibbles
from lbq.runtime.kernels.attention.triton import load_signs, turn
from lbq.runtime.kernels.planes.triton import activate

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(float("-inf"))
_TINY = tl.constexpr(1e-30)


@triton.jit
def _put(h, out_ptr, unit_ptr, m, k, K, PEAK: tl.constexpr):
    """A token's vector over its largest magnitude, times PEAK, and the unit that undoes it. NaN and infinity stay."""
    peak = tl.maximum(tl.max(tl.abs(h), axis=0), _TINY)
    tl.store(out_ptr + m * K + k, (h * (PEAK / peak)).to(tl.float16), mask=k < K)
    tl.store(unit_ptr + m, peak / PEAK)


@triton.jit
def _result(y_ptr, unit_ptr, factor_ptr, bias_ptr, m, N, n, mask, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Elements ``n`` of a product's row ``m`` in float32."""
    y = tl.load(y_ptr + m * N + n, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        y *= tl.load(unit_ptr + m) * tl.load(factor_ptr + n, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask, other=0.0)
    return y


@triton.jit
def add_norm(
    x_ptr,
    y_ptr,
    unit_ptr,
    factor_ptr,
    bias_ptr,
    norm_ptr,
    out_ptr,
    out_unit_ptr,
    K,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    PEAK: tl.constexpr,
    BK: tl.constexpr,
):
    """x += a product's result if ADD; then, if NORM, the root-mean-square norm of x as an operand. A token a program.

    x float32 [M, K], changed in place; norm float32 [K]; y, out [M, K].
    """
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    inside = k < K
    x = tl.load(x_ptr + m * K + k, mask=inside, other=0.0)
    if ADD:
        x += _result(y_ptr, unit_ptr, factor_ptr, bias_ptr, m, K, k, inside, SCALED, HAS_BIAS)
        tl.store(x_ptr + m * K + k, x, mask=inside)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / K + EPS)
        _put(x * rstd * tl.load(norm_ptr + k, mask=inside, other=0.0), out_ptr, out_unit_ptr, m, k, K, PEAK)


@triton.jit
def operand(x_ptr, out_ptr, out_unit_ptr, K, PEAK: tl.constexpr, BK: tl.constexpr):
    """x [M, K] of any float type as an operand. A token a program."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    x = tl.load(x_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
    _put(x, out_ptr, out_unit_ptr, m, k, K, PEAK)


@triton.jit
def gate(
    y_ptr,
    unit_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    out_unit_ptr,
    K,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PEAK: tl.constexpr,
    BK: tl.constexpr,
):
    """ACTIVATION(gate) · up as an operand [M, K], from the product y [M, 2K] of both. A token a program."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    inside = k < K
    opened = activate(_result(y_ptr, unit_ptr, factor_ptr, bias_ptr, m, 2 * K, k, inside, SCALED, HAS_BIAS), ACTIVATION)
    up = _result(y_ptr, unit_ptr, factor_ptr, bias_ptr, m, 2 * K, k + K, inside, SCALED, HAS_BIAS)
    _put(opened * up, out_ptr, out_unit_ptr, m, k, K, PEAK)


@triton.jit(do_not_specialize=["M", "START", "SLOTS"])
def heads(
    y_ptr,
    unit_ptr,
    factor_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    kv_ptr,
    M,
    START,
    SLOTS,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    Q_EPS: tl.constexpr,
    K_EPS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
):
    """q, k and v from the product y [M, (H + 2·KV_HEADS)·D] of M tokens at START, …: BM tokens of a head a program.

    q and k normed over D unless their EPS is None, the first DIMS turned by cos and sin, float32 [M, DIMS/2]; q
    [M, H·D] in a 16-bit float type; k and v into the cache [2, KV_HEADS, SLOTS, D] in one.
    """
    DP: tl.constexpr = triton.next_power_of_2(D)
    HALF: tl.constexpr = DIMS // 2
    N: tl.constexpr = (H + 2 * KV_HEADS) * D
    h = tl.program_id(1)
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    m = tokens.to(tl.int64)[:, None]
    d = tl.arange(0, DP)[None, :]
    mask = (tokens < M)[:, None] & (d < D)
    x = tl.load(y_ptr + m * N + h * D + d, mask=mask, other=0.0).to(tl.float32)
    turns = (h < H + KV_HEADS) & (d < DIMS)
    other = tl.where(turns, tl.where(d < HALF, d + HALF, d - HALF), d)  # the one it is turned with
    partner = tl.load(y_ptr + m * N + h * D + other, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        unit = tl.load(unit_ptr + tokens, mask=tokens < M, other=0.0)[:, None]
        x *= unit * tl.load(factor_ptr + h * D + d, mask=d < D, other=0.0).to(tl.float32)
        partner *= unit * tl.load(factor_ptr + h * D + other, mask=d < D, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + h * D + d, mask=d < D, other=0.0)
        partner += tl.load(bias_ptr + h * D + other, mask=d < D, other=0.0)
    if Q_EPS is not None:  # noqa: SIM102  known when this is compiled, and the other is not
        if h < H:
            rstd = tl.rsqrt(tl.sum(tl.where(d < D, x * x, 0.0), axis=1, keep_dims=True) / D + Q_EPS)
            x *= rstd * tl.load(q_norm_ptr + d, mask=d < D, other=0.0)
            partner *= rstd * tl.load(q_norm_ptr + other, mask=d < D, other=0.0)
    if K_EPS is not None:  # noqa: SIM102
        if (h >= H) & (h < H + KV_HEADS):
            rstd = tl.rsqrt(tl.sum(tl.where(d < D, x * x, 0.0), axis=1, keep_dims=True) / D + K_EPS)
            x *= rstd * tl.load(k_norm_ptr + d, mask=d < D, other=0.0)
            partner *= rstd * tl.load(k_norm_ptr + other, mask=d < D, other=0.0)
    angle = m * HALF + tl.where(d < HALF, d, d - HALF)
    cos = tl.load(cos_ptr + angle, mask=turns & mask, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turns & mask, other=0.0)
    x = x * cos + partner * tl.where(d < HALF, -sin, sin)
    if h < H:
        tl.store(q_ptr + m * (H * D) + h * D + d, x.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        slot = (h - H).to(tl.int64) * SLOTS + START + tokens  # keys' heads, then values'
        tl.store(kv_ptr + slot[:, None] * D + d, x.to(kv_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "START", "SLOTS"])
def close(
    x_ptr, units_ptr, signs_ptr, kv_ptr, kv_scale_ptr, M, START, SLOTS, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Keys and values x [2, KV_HEADS, M, D] into a cache of BITS bits from START on: BM tokens of a head a program.

    See ``attention.packed.attend_packed`` for how it keeps them.
    """
    DP: tl.constexpr = triton.next_power_of_2(D)
    W: tl.constexpr = D * BITS // 8
    WP: tl.constexpr = DP * BITS // 8
    T: tl.constexpr = DP if DP < LARGEST else LARGEST
    row = tl.program_id(1)
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    d = tl.arange(0, DP)[None, :]
    x = tl.load(x_ptr + (row.to(tl.int64) * M + tokens) * D + d, mask=(tokens < M) & (d < D), other=0.0).to(tl.float32)
    if row < KV_HEADS:
        x /= tl.load(units_ptr + row * D + d, mask=d < D, other=1.0)
    if BITS == 8:
        if row < KV_HEADS:
            x = turn(x.to(tl.float16), load_signs(signs_ptr, 0, D, D, T, T))
        codes, scale = eight(x)
    else:
        x = x.to(tl.float16)
        low = tl.dot(x, load_signs(signs_ptr, 0, W, D, DP, WP))
        low, high, scale = four(low, tl.dot(x, load_signs(signs_ptr, W, W, D, DP, WP)))
        codes = nibbles(low, high)
    slot = row.to(tl.int64) * SLOTS + START + tokens
    w = tl.arange(0, WP)[None, :]
    tl.store(kv_ptr + slot * W + w, codes, mask=(tokens < M) & (w < W))
    tl.store(kv_scale_ptr + slot, scale, mask=tokens < M)


@triton.jit(do_not_specialize=["STOP", "SLOTS"])
def open_all(
    kv_ptr, kv_scale_ptr, units_ptr, signs_ptr, out_ptr, STOP, SLOTS, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The first STOP slots of a cache of BITS bits in a 16-bit float type [2, KV_HEADS, STOP, D]: BS slots a program.

    What is turned back is exact until it is scaled: float16 has the codes, and float32 their sums.
    """
    DP: tl.constexpr = triton.next_power_of_2(D)
    W: tl.constexpr = D * BITS // 8
    WP: tl.constexpr = DP * BITS // 8
    T: tl.constexpr = DP if DP < LARGEST else LARGEST
    slot = tl.program_id(0) * BS + tl.arange(0, BS)[:, None]
    d = tl.arange(0, DP)[None, :]
    w = tl.arange(0, WP)[None, :]
    row = tl.program_id(1)
    codes = tl.load(kv_ptr + (row.to(tl.int64) * SLOTS + slot) * W + w, mask=(slot < STOP) & (w < W), other=0)
    scale = tl.load(kv_scale_ptr + row.to(tl.int64) * SLOTS + slot, mask=slot < STOP, other=0.0)
    if BITS == 8:
        x = codes.to(tl.float32)
        if row < KV_HEADS:
            x = turn(codes.to(tl.float16), load_signs(signs_ptr, 0, D, D, T, T)) / SIZE
    else:
        low = ((codes & 15).to(tl.float32) - 8.0).to(tl.float16)
        high = ((codes >> 4).to(tl.float32) - 8.0).to(tl.float16)
        x = tl.dot(low, _rows_of_signs(signs_ptr, 0, W, D, DP, WP))
        x = tl.dot(high, _rows_of_signs(signs_ptr, W, W, D, DP, WP), x) / SIZE
    if row < KV_HEADS:
        x *= tl.load(units_ptr + row * D + d, mask=d < D, other=1.0)
    at = out_ptr + (row.to(tl.int64) * STOP + slot) * D + d
    tl.store(at, (x * scale).to(out_ptr.dtype.element_ty), mask=(slot < STOP) & (d < D))


@triton.jit
def _rows_of_signs(signs_ptr, first, HEIGHT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr):
    """HEIGHT rows from ``first`` on of signs float16 [D, D]: [HP, DP], zero past their ends."""
    e = tl.arange(0, HP)[:, None]
    d = tl.arange(0, DP)[None, :]
    return tl.load(signs_ptr + (first + e) * D + d, mask=(e < HEIGHT) & (d < D), other=0.0)


@triton.jit
def _block(
    q,
    acc,
    peak,
    total,
    k_at,
    v_at,
    position,
    n0,
    stop,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys and values into the running softmax (Milakov & Gimelshein 2018)."""
    n = tl.arange(0, BN)
    token = n0 + n
    dk = tl.arange(0, DP)
    if MASKED:
        there = token < stop
        keys = tl.load(k_at + token[None, :] * D, mask=there[None, :] & (dk < D)[:, None], other=0)
        values = tl.load(v_at + token[:, None] * D, mask=there[:, None] & (dk < D)[None, :], other=0)
    elif D == DP:
        keys = tl.load(k_at + token[None, :] * D)
        values = tl.load(v_at + token[:, None] * D)
    else:
        keys = tl.load(k_at + token[None, :] * D, mask=(dk < D)[:, None], other=0)
        values = tl.load(v_at + token[:, None] * D, mask=(dk < D)[None, :], other=0)
    scores = tl.dot(q, keys) * (SCALE * _LOG2_E)
    if MASKED:
        seen = token[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (token[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, _LOWEST)
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    level = tl.where(higher == _LOWEST, 0.0, higher) if WINDOW else higher
    shrink = tl.exp2(peak - level)
    p = tl.exp2(scores - level[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(q.dtype), values, acc * shrink[:, None])
    return acc, higher, total


@triton.jit(do_not_specialize=["M", "START", "SLOTS"])
def attend(
    q_ptr,
    kv_ptr,
    out_ptr,
    M,
    START,
    SLOTS,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Causal attention of M tokens at START, … of G·KV_HEADS heads: BM tokens of a head a program.

    After FlashAttention-2 (Dao 2023). q, out [M, G·KV_HEADS·D]; the cache kv [2, KV_HEADS, SLOTS, D] holds START + M
    tokens, of q's type. WINDOW: tokens that are seen, or 0. Who has most to do comes first.
    """
    DP: tl.constexpr = triton.next_power_of_2(D)
    h = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    tokens = tile * BM + tl.arange(0, BM)
    position = START + tokens
    d = tl.arange(0, DP)
    rows = q_ptr + tokens.to(tl.int64)[:, None] * (KV_HEADS * G * D) + h * D + d[None, :]
    inside = (tokens < M)[:, None] & (d < D)[None, :]
    q = tl.load(rows, mask=inside, other=0.0)
    k_slot = (h // G).to(tl.int64) * SLOTS
    v_slot = (KV_HEADS + h // G).to(tl.int64) * SLOTS
    k_at = kv_ptr + k_slot * D + d[:, None]
    v_at = kv_ptr + v_slot * D + d[None, :]
    stop = START + tl.minimum(tile * BM + BM, M)
    begin = 0
    whole = (START + tile * BM) // BN * BN  # blocks before this one are seen by every token, but for the window
    if WINDOW:
        begin = tl.maximum(START + tile * BM + 1 - WINDOW, 0) // BN * BN
        whole = begin
    acc = tl.zeros([BM, DP], dtype=tl.float32)
    peak = tl.zeros([BM], dtype=tl.float32) + _LOWEST
    total = tl.zeros([BM], dtype=tl.float32)
    if not WINDOW:
        for n0 in tl.range(0, whole, BN, num_stages=STAGES):
            acc, peak, total = _block(
                q, acc, peak, total, k_at, v_at, position, n0, stop, D, DP, BN, SCALE, WINDOW, False
            )  # fmt: skip
    for n0 in tl.range(whole, stop, BN, num_stages=STAGES):
        acc, peak, total = _block(
            q, acc, peak, total, k_at, v_at, position, n0, stop, D, DP, BN, SCALE, WINDOW, True
        )  # fmt: skip
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # zero: a row past M, outside of every window
    at = out_ptr + tokens.to(tl.int64)[:, None] * (KV_HEADS * G * D) + h * D + d[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
