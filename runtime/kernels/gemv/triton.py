# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of the matrix-vector product on packed weights, and of the two layout passes it needs.

Integers do the work: activations arrive as two int8 planes (``quantize``), weights are opened into four signed bytes
a register with one or two logic operations, and ``dp4a`` multiplies and adds four of them exactly. A *column* is one
word of a row at 8 and 4 bits, and one word of each of the row's three runs at 3 bits; it holds C = 4, 8 or 32 codes.

Opened bytes carry the code in their top bits, which makes them signed without a correction: byte =
(code − 2^(b−1)) · 2^(8−b). ``quantize`` folds that power of two, and the 254 of the planes, into its scales.

Tiles are [columns, rows]: with K first, Triton gives the weights, the scales and the activations the same layout, and
no value crosses threads before the last sum. That holds when a tile has 128 columns a warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret  # as it stood when the kernels below were decorated

_TOP_BITS = tl.constexpr(0x80808080 - (1 << 32))  # as int32
_HIGH_NIBBLES = tl.constexpr(0xF0F0F0F0 - (1 << 32))
_TOP_THREE = tl.constexpr(0xE0E0E0E0 - (1 << 32))
_BELOW_TOP = tl.constexpr(0x60606060)
_DP4A = tl.constexpr("dp4a.s32.s32 $0, $1, $2, $3;")
_NIBBLES = tl.constexpr(
    "{ .reg .b32 top; mov.b32 top, 0x80808080; lop3.b32 $0, $1, 0xf0f0f0f0, top, 0x6a; }"  # a & b ^ c
)
_PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
_TINY = tl.constexpr(1e-30)  # a block of activations below this counts as zero, so that 127 / amax is finite
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _dot4(a, b, c, EMULATE: tl.constexpr):
    """c + Σ aᵢ·bᵢ over the four signed bytes of a and b; EMULATE spells out what the interpreter cannot assemble."""
    if EMULATE:
        for i in tl.static_range(4):
            c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    else:
        c = tl.inline_asm_elementwise(_DP4A, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)
    return c


@triton.jit
def _high_nibbles(w, EMULATE: tl.constexpr):
    """Those of each byte, less 8, times 16, by one operation: compilers make it two, which have a constant each."""
    if EMULATE:
        code = (w & _HIGH_NIBBLES) ^ _TOP_BITS
    else:
        code = tl.inline_asm_elementwise(_NIBBLES, "=r,r", [w], dtype=tl.int32, is_pure=True, pack=1)
    return code


@triton.jit
def open_codes(w0, w1, w2, r: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """Codes (C/4)·i + r, i = 0…3, of a column as four signed bytes, each times 2^(8−BITS).

    ``w0``, or at 3 bits all three, are the column's words: see ``split_planes``.
    """
    if BITS == 8:
        code = w0 ^ _TOP_BITS
    elif BITS == 4:
        code = _high_nibbles(w0 << (4 - 4 * r), EMULATE)
    elif r < 6:  # whole in a word, its sign in place already
        w = w0 if r < 2 else (w1 if r < 4 else w2)
        code = (w << (3 * (r % 2))) & _TOP_THREE
    else:
        w = w0 if r == 6 else w1
        code = ((w << 5) & _BELOW_TOP) | ((w2 << r) & _TOP_BITS)
    return code


@triton.jit
def load_weights(w_row, s_row, k0, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, BW: tl.constexpr):
    """The weights of BW columns from k0 on: one word, or at 3 bits three; and their scales.

    Scales are [BW/4, rows], or [BW, rows] at 3 bits; 1 where a row has one scale, which is applied at the end.
    """
    C: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    COLS: tl.constexpr = (K + C - 1) // C
    U: tl.constexpr = 1 if BITS == 3 else 4
    c = (k0 + tl.arange(0, BW))[:, None]
    w0 = tl.load(w_row + c, mask=c < COLS, other=0, eviction_policy="evict_first")
    w1 = w0
    w2 = w0
    if BITS == 3:
        w1 = tl.load(w_row + COLS + c, mask=c < COLS, other=0, eviction_policy="evict_first")
        w2 = tl.load(w_row + 2 * COLS + c, mask=c < COLS, other=0, eviction_policy="evict_first")
    if G == K:
        s = tl.full([1, 1], 1.0, tl.float32)
    else:
        k = (k0 * C + tl.arange(0, BW // U) * (U * C))[:, None]
        s = tl.load(s_row + k // G, mask=k < K, other=0.0)
    return w0, w1, w2, s


@triton.jit
def store_planes(
    x,
    block,
    q_ptr,
    s_ptr,
    BLOCKS,
    XC,
    C: tl.constexpr,
    FOLD: tl.constexpr,
    BB: tl.constexpr,
    SIZE: tl.constexpr = 32,
):
    """Blocks x [BB, SIZE] of activations, zero past their end, into int8 planes q int32 [2, C/4, XC] and s [BLOCKS].

    ``block`` [BB] are their numbers. Byte i of q[p, r, c] is plane p of element C·c + (C/4)·i + r;
    x = s / FOLD · (254·plane₀ + plane₁) within max|x| / 64516 of the block. A block with a NaN or an infinity gets a
    NaN scale. Columns past XC and scales past BLOCKS are left alone.
    """
    finite = tl.abs(x) < _INFINITY
    amax = tl.max(tl.where(finite, tl.abs(x), _INFINITY), axis=1)
    broken = amax == _INFINITY
    x = tl.where(finite, x, 0.0)  # NaN has no integer: the scale will say it
    usable = amax >= _TINY
    v = x * tl.where(usable, 127.0 / tl.where(usable, amax, 1.0), 0.0)[:, None]
    first = tl.floor(v + 0.5)
    second = tl.floor((v - first) * 254.0 + 0.5)
    scale = tl.where(broken, float("nan"), tl.where(usable, amax * (FOLD / (127 * 254)), 0.0))
    tl.store(s_ptr + block, scale, mask=block < BLOCKS)

    R: tl.constexpr = C // 4
    CB: tl.constexpr = SIZE // C  # columns a block
    shift = (tl.arange(0, SIZE) // R % 4 * 8)[None, :]
    c = block[:, None, None] * CB + tl.arange(0, CB)[None, :, None]
    r = tl.arange(0, R)[None, None, :]
    out = q_ptr + r * XC + c
    keep = (c < XC) & (r < R)
    tl.store(out, tl.sum(((first.to(tl.int32) & 255) << shift).reshape(BB, CB, 4, R), axis=2), mask=keep)
    tl.store(out + R * XC, tl.sum(((second.to(tl.int32) & 255) << shift).reshape(BB, CB, 4, R), axis=2), mask=keep)


@triton.jit
def quantize(
    x_ptr, q_ptr, s_ptr, K, BLOCKS, XC, C: tl.constexpr, FOLD: tl.constexpr, BB: tl.constexpr, SIZE: tl.constexpr
):
    """Activations x [M, K] → planes q int32 [M, 2, C/4, XC] and scales s float32 [M, BLOCKS]: see ``store_planes``."""
    m = tl.program_id(1)
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    e = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + m * K + e, mask=e < K, other=0.0).to(tl.float32)
    store_planes(x, block, q_ptr + m * (2 * (C // 4) * XC), s_ptr + m * BLOCKS, BLOCKS, XC, C, FOLD, BB, SIZE)


@triton.jit
def call(ptr, used, BYTES: tl.constexpr):
    """Ask for the first BYTES from each of ``ptr`` on, at most ``used`` of them, to be brought into L2."""
    LINES: tl.constexpr = (BYTES + 127) // 128
    line = tl.arange(0, triton.next_power_of_2(LINES))[:, None] * 128
    address = ptr.to(tl.int64) + tl.minimum(tl.minimum(line, (LINES - 1) * 128), used - 1)
    tl.inline_asm_elementwise(_PREFETCH, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def call_share(ptr, ROWS, PITCH: tl.constexpr, LINES: tl.constexpr, SHARE: tl.constexpr):
    """Ask for this program's SHARE of the first LINES · 128 bytes of all ROWS of PITCH words to be brought into L2."""
    line = tl.program_id(0) * SHARE + tl.minimum(tl.arange(0, triton.next_power_of_2(SHARE)), SHARE - 1)
    line = tl.minimum(line, ROWS * LINES - 1)
    word = line // LINES * PITCH + tl.minimum(line % LINES * 32, PITCH - 1)
    address = (ptr + word).to(tl.int64)
    tl.inline_asm_elementwise(_PREFETCH, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def call_rows(w_ptr, rows, WORDS: tl.constexpr, FIRST: tl.constexpr):
    """Ask for words [FIRST, WORDS) of ``rows`` to be brought into L2, a cache line of 32 words at a time."""
    call((w_ptr + (rows[None, :] * WORDS + FIRST)), (WORDS - FIRST) * 4, (WORDS - FIRST) * 4)


@triton.jit
def first_weights(
    w_ptr,
    s_ptr,
    rows,
    K: tl.constexpr,
    G: tl.constexpr,
    BITS: tl.constexpr,
    BW: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The weights of ``rows`` that ``row_products`` begins with: of EARLY steps, 1 or 2; the second repeats the first
    where there is none. With AHEAD the others are called into L2.
    """
    C: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # codes a column
    COLS: tl.constexpr = (K + C - 1) // C
    RUNS: tl.constexpr = 3 if BITS == 3 else 1
    w_row = w_ptr + rows[None, :] * (RUNS * COLS)
    s_row = s_ptr + rows[None, :] * (K // G)
    begun = load_weights(w_row, s_row, 0, K, G, BITS, BW)
    second = begun
    if EARLY > 1 and BW < COLS:
        second = load_weights(w_row, s_row, BW, K, G, BITS, BW)
    if AHEAD and COLS > EARLY * BW:
        call_rows(w_ptr, rows, RUNS * COLS, 0 if BITS == 3 else EARLY * BW)
    return begun, second


@triton.jit
def row_products(
    begun,
    second_step,
    w_ptr,
    s_ptr,
    q_ptr,
    xs_ptr,
    rows,
    K: tl.constexpr,
    G: tl.constexpr,
    BITS: tl.constexpr,
    XC: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    EARLY: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Σₖ s[n, k // G] · (code[n, k] − 2^(BITS−1)) · x[k] for ``rows`` n, int [BN] within the matrix: float32 [BN].

    ``begun`` and ``second_step`` are what ``first_weights`` gave. Where a row has one scale, G == K, it is left to the
    caller. Walks K in steps of BW columns with EARLY steps' weights already under way.
    """
    C: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # codes a column
    COLS: tl.constexpr = (K + C - 1) // C
    RUNS: tl.constexpr = 3 if BITS == 3 else 1
    U: tl.constexpr = 1 if BITS == 3 else 4  # columns under one scale of w and one of x, added as integers
    BU: tl.constexpr = BW // U

    cols = tl.arange(0, BW)
    units = tl.arange(0, BU) * (U * C)  # the first code of each unit of U columns
    w_row = w_ptr + rows[None, :] * (RUNS * COLS)
    s_row = s_ptr + rows[None, :] * (K // G)
    acc = tl.zeros([BU, BN], dtype=tl.float32)
    w0, w1, w2, s = begun
    following = second_step
    for k0 in tl.static_range(0, COLS, BW):
        if k0 + EARLY * BW < COLS:
            ahead = load_weights(w_row, s_row, k0 + EARLY * BW, K, G, BITS, BW)
        first = tl.zeros([BW, BN], dtype=tl.int32)
        second = tl.zeros([BW, BN], dtype=tl.int32)
        for r in tl.static_range(C // 4):
            code = open_codes(w0, w1, w2, r, BITS, EMULATE)
            x = q_ptr + (r * XC + k0) + cols
            valid = cols + k0 < COLS
            first = _dot4(code, tl.load(x, mask=valid, other=0)[:, None], first, EMULATE)
            second = _dot4(code, tl.load(x + C // 4 * XC, mask=valid, other=0)[:, None], second, EMULATE)
        both = first * 254 + second  # of a unit: 32 codes · 2^7 · 127 · 255 < 2^28
        if U > 1:
            both = tl.sum(both.reshape(BU, U, BN), axis=1)
        k = units + k0 * C
        x_scale = tl.load(xs_ptr + k // 32, mask=k < K, other=0.0)
        acc += both.to(tl.float32) * (s.to(tl.float32) * x_scale[:, None])
        if EARLY > 1:
            w0, w1, w2, s = following
            if k0 + EARLY * BW < COLS:
                following = ahead
        elif k0 + BW < COLS:
            w0, w1, w2, s = ahead

    return tl.sum(acc, axis=0)


@triton.jit
def activations(q_ptr, xs_ptr, K: tl.constexpr, BITS: tl.constexpr, XC: tl.constexpr, BW: tl.constexpr):
    """All planes of one token, a tuple of int32 [BW] for both planes of each r, and the scales of units of columns."""
    C: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    COLS: tl.constexpr = (K + C - 1) // C
    U: tl.constexpr = 1 if BITS == 3 else 4
    cols = tl.arange(0, BW)
    x = ()
    for i in tl.static_range(2 * (C // 4)):
        x = x + (tl.load(q_ptr + i * XC + cols, mask=cols < COLS, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    k = tl.arange(0, BW // U) * (U * C)
    return x, tl.load(xs_ptr + k // 32, mask=k < K, other=0.0)


@triton.jit
def whole_rows(loaded, x, x_scale, BITS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, EMULATE: tl.constexpr):
    """As ``row_products``, of rows ``loaded`` whole by ``load_weights`` and what ``activations`` gave: float32 [BN]."""
    C: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    U: tl.constexpr = 1 if BITS == 3 else 4
    w0, w1, w2, s = loaded
    first = tl.zeros([BW, BN], dtype=tl.int32)
    second = tl.zeros([BW, BN], dtype=tl.int32)
    for r in tl.static_range(C // 4):
        code = open_codes(w0, w1, w2, r, BITS, EMULATE)
        first = _dot4(code, x[r][:, None], first, EMULATE)
        second = _dot4(code, x[r + C // 4][:, None], second, EMULATE)
    both = first * 254 + second
    if U > 1:
        both = tl.sum(both.reshape(BW // U, U, BN), axis=1)
    return tl.sum(both.to(tl.float32) * (s.to(tl.float32) * x_scale[:, None]), axis=0)


@triton.jit(do_not_specialize=["N", "M"])  # a kernel compiles once for 1 to 16 tokens
def gemv(
    w_ptr,
    s_ptr,
    q_ptr,
    xs_ptr,
    bias_ptr,
    y_ptr,
    N,
    M,
    K: tl.constexpr,
    G: tl.constexpr,
    BITS: tl.constexpr,
    XC: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """y[m, n] = Σₖ s[n, k // G] · (code[n, k] − 2^(BITS−1)) · x[m, k] + bias[n], added in float32.

    w int32 [N, COLS] or, at 3 bits, [N, 3, COLS]; s bfloat16 [N, K/G]; q and xs as ``quantize`` writes them with
    FOLD = 2^(BITS−8); bias float32 [N]; y [M, N] of any float type. A program owns BN rows and one token. Tokens vary
    fastest: they share L2.
    """
    C: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # codes a column
    m = tl.program_id(0) % M
    rows = (tl.program_id(0) // M) * BN + tl.arange(0, BN)
    safe = tl.minimum(rows, N - 1)
    q_ptr += m * (2 * (C // 4) * XC)
    xs_ptr += m * ((K + 31) // 32)
    if G == K:
        row_scale = tl.load(s_ptr + safe).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + safe)

    begun, second = first_weights(w_ptr, s_ptr, safe, K, G, BITS, BW, False, 1)
    y = row_products(begun, second, w_ptr, s_ptr, q_ptr, xs_ptr, safe, K, G, BITS, XC, BN, BW, 1, EMULATE)
    if G == K:
        y *= row_scale
    if HAS_BIAS:
        y += bias
    tl.store(y_ptr + m * N + rows, y.to(y_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def split_planes(src_ptr, dst_ptr, COUNT, WORDS, COLS, BT: tl.constexpr):
    """A dense 3-bit stream [N, WORDS] → [N, 3, COLS], COUNT = N·COLS; 32 codes are three words in both.

    Of a column's words each byte holds two whole codes and two bits: byte i of word j has code 8·i + 2·j in bits 5…7
    and 8·i + 2·j + 1 in bits 2…4. Bits 0 and 1 of words 0 and 1 are the lower two of codes 8·i + 6 and 8·i + 7, those
    of word 2 are the third of 8·i + 7 and of 8·i + 6. Every third bit is inverted: it is the sign of code − 4. So most
    codes open by one shift and one mask.
    """
    index = tl.program_id(0) * BT + tl.arange(0, BT)
    n = index // COLS
    t = index % COLS
    inside = index < COUNT
    src = src_ptr + n * WORDS + 3 * t
    a = tl.load(src, mask=inside & (3 * t < WORDS), other=0)
    b = tl.load(src + 1, mask=inside & (3 * t + 1 < WORDS), other=0)
    c = tl.load(src + 2, mask=inside & (3 * t + 2 < WORDS), other=0)
    w0 = tl.zeros([BT], dtype=tl.int32)
    w1 = tl.zeros([BT], dtype=tl.int32)
    w2 = tl.zeros([BT], dtype=tl.int32)
    for e in tl.static_range(32):
        if e == 10:  # bits 30, 31 and 32
            code = ((a >> 30) & 3) | ((b & 1) << 2)
        elif e == 21:  # bits 63, 64 and 65
            code = ((b >> 31) & 1) | ((c & 3) << 1)
        elif e < 10:
            code = a >> (3 * e)
        elif e < 21:
            code = b >> (3 * e - 32)
        else:
            code = c >> (3 * e - 64)
        code = (code & 7) ^ 4
        if e % 8 == 6:
            w0 |= (code & 3) << (e // 8 * 8)
            w2 |= (code >> 2) << (e // 8 * 8 + 1)
        elif e % 8 == 7:
            w1 |= (code & 3) << (e // 8 * 8)
            w2 |= (code >> 2) << (e // 8 * 8)
        elif e % 8 < 2:
            w0 |= code << (e // 8 * 8 + 5 - 3 * (e % 2))
        elif e % 8 < 4:
            w1 |= code << (e // 8 * 8 + 5 - 3 * (e % 2))
        else:
            w2 |= code << (e // 8 * 8 + 5 - 3 * (e % 2))
    dst = dst_ptr + n * (3 * COLS) + t
    tl.store(dst, w0, mask=inside)
    tl.store(dst + COLS, w1, mask=inside)
    tl.store(dst + 2 * COLS, w2, mask=inside)
