# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel of a few tokens' product with packed weights: one pass over the weights, int8 tensor cores.

``mma.m16n8k32`` multiplies 16 rows by 8 columns; here the columns are the two int8 planes of four tokens. Its operands
lie in registers as a load of 16 bytes a thread leaves them: of a warp's 32 threads four read 64 bytes of a row, and the
eight groups of four read eight rows, which is how the instruction wants its first operand, but for the order along K,
and the activations are read in the same order. So weights go from memory through two logic operations into the tensor
core, with no shuffle and no shared memory. That rests on the layout that Triton gives a tile [16, 8 · warps] whose
first axis is contiguous; ``test_compile`` checks it. The second axis is the warp and the row: some warps have the same
rows and share their tiles out between them, others have other rows.

Where a group of weights is a half or a quarter of a tile, so are the threads of a row: there is an instruction for each
of the parts then, with the other threads' activations zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.arrivals import arrived, let_in, take_turn
from lbq.runtime.kernels.gemv.triton import _dot4, _open, store_planes
from lbq.runtime.kernels.planes.triton import activate, norm_blocks, store_normed

# Rows g and g + 8 of four words each, opened into bytes of one or two halves; planes of four tokens; the sums of both
# planes as float32, of each part in one of a thread's four results. Zero codes where there is no second half.
_STEP = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{c0,c1,c2,c3}}, {{${},${},${},${}}}, {{{},{}}}, {};"
_SUMS = """mad.lo.s32 c0, c0, 254, c1; cvt.rn.f32.s32 ${}, c0;
mad.lo.s32 c2, c2, 254, c3; cvt.rn.f32.s32 ${}, c2;"""


def _assembly(bits: int, parts: int) -> tuple[str, str]:
    """The products of one tile and four tokens: PTX and its constraints. Operands from $8 on: the opened words of
    rows g, then of rows g + 8, then of the planes; at 4 bits first the low nibbles' of all four, then the high ones'.
    """
    halves = 8 // bits  # registers that a word opens into
    low, high, x = 8, 8 + 4 * halves, 8 + 8 * halves
    lines = ["{ .reg .b32 c0, c1, c2, c3, z, t, p, q; .reg .pred here; mov.b32 z, 0;"]
    if parts > 1:
        lines.append("mov.u32 t, %laneid; and.b32 t, t, 3;")
    for part in range(parts):
        if parts > 1:  # which of the four threads of a row have it
            lines.append(f"shr.u32 p, t, {2 // parts}; setp.eq.u32 here, p, {part};")
        for i in range(2 * halves):  # of 8 bytes of a row a thread
            one, two = (2 * i, 2 * i + 1) if bits == 8 else (i, i + 4)
            xs = [f"${x + one}", f"${x + two}"]
            if parts > 1:
                lines.append(f"selp.b32 p, {xs[0]}, 0, here; selp.b32 q, {xs[1]}, 0, here;")
                xs = ["p", "q"]
            start = "{c0,c1,c2,c3}" if i else "{z,z,z,z}"
            lines.append(_STEP.format(low + one, high + one, low + two, high + two, *xs, start))
        lines.append(_SUMS.format(part, 4 + part))
    lines += [f"mov.b32 ${i}, 0; mov.b32 ${4 + i}, 0;" for i in range(parts, 4)]
    return "\n".join([*lines, "}"]), ",".join(["=f"] * 8 + ["r"] * (12 * halves))


_MMA4, _MMA4_OPERANDS = (tl.constexpr(text) for text in _assembly(4, 1))
_MMA4_HALVES, _ = (tl.constexpr(text) for text in _assembly(4, 2))
_MMA4_QUARTERS, _ = (tl.constexpr(text) for text in _assembly(4, 4))
_MMA8, _MMA8_OPERANDS = (tl.constexpr(text) for text in _assembly(8, 1))
_MMA8_HALVES, _ = (tl.constexpr(text) for text in _assembly(8, 2))


@triton.jit
def _emulated(a, x, W: tl.constexpr, PARTS: tl.constexpr):
    """Σ over the columns of each part of a [16, W · 8 rows] · x [16, W · 8 planes], byte by byte: int32 [PARTS, W,
    8 planes, 8 rows]."""
    a = a.reshape(16, W, 1, 8)
    x = x.reshape(16, W, 8, 1)
    return tl.sum(_dot4(a, x, a * 0 + x * 0, True).reshape(PARTS, 16 // PARTS, W, 8, 8), axis=1)


@triton.jit
def _placed(c, W: tl.constexpr, PARTS: tl.constexpr):
    """c [PARTS, W, 8 planes, 8 rows] as the assembly leaves it: both planes of token t and part p at 4·t + p of float32
    [16, W · 8]."""
    plane = tl.arange(0, 2)[None, None, None, :, None]
    both = tl.sum(c.reshape(PARTS, W, 4, 2, 8) * tl.where(plane == 0, 254, 1), axis=3)  # [PARTS, W, 4, 8]
    both = tl.permute(both, 2, 0, 1, 3)[:, None]
    here = tl.arange(0, 4)[None, :, None, None, None] == tl.arange(0, PARTS)[None, None, :, None, None]
    return tl.sum(tl.where(here, both, 0), axis=2).reshape(16, W * 8).to(tl.float32)


@triton.jit
def _products(w, v, x0, x1, BITS: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr, EMULATE: tl.constexpr):
    """Words of rows g and of rows g + 8, [16, W · 8], by the planes of four tokens: float32 [16, W · 8] each."""
    a0 = _open(w, w, w, 0, BITS)
    b0 = _open(v, v, v, 0, BITS)
    if BITS == 4:
        a1 = _open(w, w, w, 1, BITS)
        b1 = _open(v, v, v, 1, BITS)
    if EMULATE:
        y = _emulated(a0, x0, W, PARTS)
        z = _emulated(b0, x0, W, PARTS)
        if BITS == 4:
            y += _emulated(a1, x1, W, PARTS)
            z += _emulated(b1, x1, W, PARTS)
        y = _placed(y, W, PARTS)
        z = _placed(z, W, PARTS)
    elif BITS == 4:
        four: tl.constexpr = _MMA4 if PARTS == 1 else _MMA4_HALVES if PARTS == 2 else _MMA4_QUARTERS
        y, z = tl.inline_asm_elementwise(
            four, _MMA4_OPERANDS, [a0, a1, b0, b1, x0, x1], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    else:
        eight: tl.constexpr = _MMA8 if PARTS == 1 else _MMA8_HALVES
        y, z = tl.inline_asm_elementwise(
            eight, _MMA8_OPERANDS, [a0, b0, x0], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    return y, z


@triton.jit
def _tile(
    w_ptr,
    s_ptr,
    rows,
    column,
    K: tl.constexpr,
    G: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Words [16, W · 8] of ``rows`` from ``column`` on, and the scale of part p at p of each four, zero elsewhere."""
    C: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = (K + C - 1) // C
    i = tl.arange(0, 16)[:, None]
    w = tl.load(w_ptr + rows * COLS + column + i, mask=column + i < COLS, other=0, eviction_policy="evict_first")
    code = column * C + i % 4 * (16 * C // PARTS)
    s = tl.load(s_ptr + rows * (K // G) + code // G, mask=(i % 4 < PARTS) & (code < K), other=0.0)
    return w, s.to(tl.float32)


@triton.jit
def _roots(squares_ptr, first: tl.constexpr, M, K: tl.constexpr, SIZE: tl.constexpr):
    """Sums of squares of four tokens' x [K], [4, ⌈K/SIZE⌉] padded with zeros."""
    BLOCKS: tl.constexpr = (K + SIZE - 1) // SIZE
    token = first + tl.arange(0, 4)[:, None]
    b = tl.arange(0, triton.next_power_of_2(BLOCKS))[None, :]
    return tl.load(squares_ptr + token * BLOCKS + b, mask=(token < M) & (b < BLOCKS), other=0.0)


@triton.jit
def _summed(y, S: tl.constexpr, T: tl.constexpr):
    """Sums over the warps that share rows, and over parts, of y [16, T · S · 8]: [4 tokens, T · 8 rows]."""
    return tl.sum(tl.sum(y.reshape(4, 4, T, S, 8), axis=3), axis=1).reshape(4, T * 8)


@triton.jit
def _ended(
    y,
    z,
    squares,
    bias_ptr,
    y_ptr,
    first: tl.constexpr,
    here,
    N,
    M,
    K: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The results of four tokens from ``first`` on, stored."""
    token = first + tl.arange(0, 4)[:, None]
    r = tl.arange(0, T * 8)[None, :]
    low = _summed(y, S, T)
    high = _summed(z, S, T)
    if NORMED:
        root = tl.rsqrt(tl.sum(squares, axis=1) / K + EPS)[:, None]
        low *= root
        high *= root
    if KIND == "gated":
        row = here + r
        inside = row < N
        if HAS_BIAS:
            low += tl.load(bias_ptr + row, mask=inside, other=0.0)
            high += tl.load(bias_ptr + N + row, mask=inside, other=0.0)
        tl.store(y_ptr + token * N + row, activate(low, ACTIVATION) * high, mask=(token < M) & inside)
    else:
        for half in tl.static_range(2):
            row = here + r // 8 * 16 + half * 8 + r % 8
            inside = (token < M) & (row < N)
            sums = high if half else low
            if HAS_BIAS:
                sums += tl.load(bias_ptr + row, mask=row < N, other=0.0)
            if KIND == "add":
                sums += tl.load(y_ptr + token * N + row, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + token * N + row, sums, mask=inside)


@triton.jit
def _hand_on(
    y_ptr,
    norm_ptr,
    q_ptr,
    s_ptr,
    squares_ptr,
    block,
    N,
    M,
    C: tl.constexpr,
    XC: tl.constexpr,
    FOLD: tl.constexpr,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Block ``block`` of the results y [M, N] into planes, of all tokens; the last stands in for those past it."""
    token = tl.minimum(tl.arange(0, TOKENS), M - 1)
    e = block * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(y_ptr + token[:, None] * N + e, mask=e < N, other=0.0, cache_modifier=".cg")
    blocks = (N + SIZE - 1) // SIZE
    q_at = q_ptr + (token * (2 * (C // 4) * XC))[:, None, None]
    s_at = s_ptr + token * blocks
    same = token * 0 + block
    if KIND == "add":
        norm = norm_blocks(norm_ptr, same, N, SIZE)
        store_normed(x, norm, same, q_at, s_at, squares_ptr + token * blocks, N, XC, C, FOLD, TOKENS, SIZE)
    else:
        store_planes(x, same, q_at, s_at, blocks, XC, C, FOLD, TOKENS, SIZE)


@triton.jit(do_not_specialize=["N", "M"])
def batch(
    w_ptr,
    s_ptr,
    q_ptr,
    xs_ptr,
    squares_ptr,
    bias_ptr,
    y_ptr,
    norm_ptr,
    q_out_ptr,
    s_out_ptr,
    squares_out_ptr,
    arrivals_ptr,
    N,
    M,
    K: tl.constexpr,
    G: tl.constexpr,
    BITS: tl.constexpr,
    XC: tl.constexpr,
    FOURS: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    C_OUT: tl.constexpr,
    XC_OUT: tl.constexpr,
    FOLD_OUT: tl.constexpr,
    SIZE_OUT: tl.constexpr,
    PDL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """y[m, n] = Σₖ s[n, k // G] · (code[n, k] − 2^(BITS−1)) · x[m, k] + bias[n] for M ≤ 4·FOURS tokens.

    w int32 [rows, COLS], 8 or 4 bits; s bfloat16 [rows, K/G], G a multiple of the 16 columns of a tile, a half or a
    quarter of it, or K; q int32 [M, 2, C/4, XC] and xs float32 [M, tiles], one scale for a tile, as ``quantize`` writes
    them with FOLD = 2^(BITS−8). x is normalised after the fact if NORMED, by its squares [M, tiles].

    KIND "store": y float32 [M, N] is stored, of N rows. "add": it is added to the residual stream ``y_ptr`` [M, N].
    "gated": there are 2N rows, gate then up, and y = act(gate) · up [M, N].

    A program of S · T warps owns T blocks of 16 rows, eight gates and their ups if "gated"; S warps share the tiles of
    a block out between them, and have those of DEPTH steps in registers ahead.

    With C_OUT, planes of the result (for "add": of the stream ⊙ norm, and its squares), a scale for SIZE_OUT elements,
    are written for the next projection: by the program itself where it owns whole such blocks, else by the last to
    arrive of those that share one.
    """
    let_in(PDL, True)
    C: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = (K + C - 1) // C
    TILES: tl.constexpr = (COLS + 15) // 16
    STEPS: tl.constexpr = (TILES + S - 1) // S
    PARTS: tl.constexpr = 1 if (G == K or G % (16 * C) == 0) else 16 * C // G
    PLANE: tl.constexpr = C // 4 * XC
    W: tl.constexpr = S * T
    OUTPUTS: tl.constexpr = T * 8 if KIND == "gated" else T * 16
    g = (tl.arange(0, W * 8) % 8)[None, :]
    warp = (tl.arange(0, W * 8) // 8)[None, :]
    part = warp % S
    i = tl.arange(0, 16)[:, None]
    here = tl.program_id(0) * OUTPUTS
    if KIND == "gated":
        low = tl.minimum(here + warp // S * 8 + g, N - 1)
        high = low + N
    else:
        low = tl.minimum(here + warp // S * 16 + g, N - 1)
        high = tl.minimum(here + warp // S * 16 + 8 + g, N - 1)

    zero = tl.zeros([16, W * 8], dtype=tl.float32)
    y0 = zero
    y1 = zero
    y2 = zero
    y3 = zero
    z0 = zero
    z1 = zero
    z2 = zero
    z3 = zero
    w, s = _tile(w_ptr, s_ptr, low, part * 16, K, G, BITS, PARTS)
    v, u = _tile(w_ptr, s_ptr, high, part * 16, K, G, BITS, PARTS)
    if DEPTH > 1:
        w1, s1 = _tile(w_ptr, s_ptr, low, part * 16 + S * 16, K, G, BITS, PARTS)
        v1, u1 = _tile(w_ptr, s_ptr, high, part * 16 + S * 16, K, G, BITS, PARTS)
    take_turn(PDL, True)
    squares0 = 0.0
    squares1 = 0.0
    squares2 = 0.0
    squares3 = 0.0
    if NORMED:
        squares0 = _roots(squares_ptr, 0, M, K, 16 * C)
        if FOURS > 1:
            squares1 = _roots(squares_ptr, 4, M, K, 16 * C)
        if FOURS > 2:
            squares2 = _roots(squares_ptr, 8, M, K, 16 * C)
        if FOURS > 3:
            squares3 = _roots(squares_ptr, 12, M, K, 16 * C)
    for step in tl.range(0, STEPS, num_stages=1):
        tile = step * S + part
        column = tile * 16
        w_next, s_next = _tile(w_ptr, s_ptr, low, column + DEPTH * S * 16, K, G, BITS, PARTS)
        v_next, u_next = _tile(w_ptr, s_ptr, high, column + DEPTH * S * 16, K, G, BITS, PARTS)
        for four in tl.static_range(FOURS):
            x = q_ptr + (four * 8 + g) * PLANE + column + i
            there = (four * 8 + g < 2 * M) & (column + i < COLS)
            x0 = tl.load(x, mask=there, other=0)
            x1 = x0
            if BITS == 4:
                x1 = tl.load(x + XC, mask=there, other=0)
            token = four * 4 + i // 4
            scale = tl.load(
                xs_ptr + token * TILES + tile, mask=(i % 4 < PARTS) & (token < M) & (tile < TILES), other=0.0
            )
            y, z = _products(w, v, x0, x1, BITS, W, PARTS, EMULATE)
            if four == 0:
                y0 += y * (s * scale)
                z0 += z * (u * scale)
            elif four == 1:
                y1 += y * (s * scale)
                z1 += z * (u * scale)
            elif four == 2:
                y2 += y * (s * scale)
                z2 += z * (u * scale)
            else:
                y3 += y * (s * scale)
                z3 += z * (u * scale)
        if DEPTH > 1:
            w, s, v, u = w1, s1, v1, u1
            w1, s1, v1, u1 = w_next, s_next, v_next, u_next
        else:
            w, s, v, u = w_next, s_next, v_next, u_next

    for four in tl.static_range(FOURS):
        y = y0 if four == 0 else y1 if four == 1 else y2 if four == 2 else y3
        z = z0 if four == 0 else z1 if four == 1 else z2 if four == 2 else z3
        squares = squares0 if four == 0 else squares1 if four == 1 else squares2 if four == 2 else squares3
        _ended(y, z, squares, bias_ptr, y_ptr, four * 4, here, N, M, K, S, T, HAS_BIAS, NORMED, EPS, KIND, ACTIVATION)
    if C_OUT > 0:
        if OUTPUTS % SIZE_OUT == 0:
            tl.debug_barrier()
            for own in tl.static_range(OUTPUTS // SIZE_OUT):
                _hand_on(
                    y_ptr, norm_ptr, q_out_ptr, s_out_ptr, squares_out_ptr, here // SIZE_OUT + own, N, M,
                    C_OUT, XC_OUT, FOLD_OUT, SIZE_OUT, KIND, FOURS * 4,
                )  # fmt: skip
        else:
            block = here // SIZE_OUT
            if arrived(arrivals_ptr, block, (tl.minimum(N - block * SIZE_OUT, SIZE_OUT) + OUTPUTS - 1) // OUTPUTS):
                _hand_on(
                    y_ptr, norm_ptr, q_out_ptr, s_out_ptr, squares_out_ptr, block, N, M,
                    C_OUT, XC_OUT, FOLD_OUT, SIZE_OUT, KIND, FOURS * 4,
                )  # fmt: skip
