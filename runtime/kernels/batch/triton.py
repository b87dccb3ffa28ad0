# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel of a few tokens' product with packed weights: one pass over the weights, int8 tensor cores.

``mma.m16n8k32`` multiplies 16 rows by 8 columns; here the columns are the two int8 planes of four tokens. Its operands
lie in registers as a load of 16 bytes a thread leaves them: of a warp's 32 threads four read 64 bytes of a row, and the
eight groups of four read eight rows, which is how the instruction wants its first operand, but for the order along K,
and the activations are read in the same order. So weights go from memory through two logic operations into the tensor
core, with no shuffle and no shared memory. That rests on the layout that Triton gives a tile [16, 8 · warps] whose
first axis is contiguous; ``test_compile`` checks it. The second axis is the warp and the row: the tiles of a row are
shared out among the warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.gemv.triton import _dot4, _open

# Rows g and g + 8 of four words each, opened into bytes of one or two halves; planes of four tokens; the sums of both
# planes as float32 in the first of each four results. Zero codes where there is no second half.
_STEP = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{c0,c1,c2,c3}}, {{${},${},${},${}}}, {{${},${}}}, {};"
_ENDS = """
mad.lo.s32 c0, c0, 254, c1; cvt.rn.f32.s32 $0, c0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
mad.lo.s32 c2, c2, 254, c3; cvt.rn.f32.s32 $4, c2; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0;
}"""


def _assembly(bits: int) -> tuple[str, str]:
    """The products of one tile and four tokens: PTX and its constraints. Operands from $8 on: the opened words of
    rows g, then of rows g + 8, then of the planes; at 4 bits first the low nibbles' of all four, then the high ones'.
    """
    halves = 8 // bits  # registers that a word opens into
    steps = []
    for i in range(2 * halves):  # of 8 bytes of a row a thread
        first, second = (2 * i, 2 * i + 1) if bits == 8 else (i, i + 4)
        low, high, x = 8, 8 + 4 * halves, 8 + 8 * halves
        start = "{c0,c1,c2,c3}" if i else "{z,z,z,z}"
        steps.append(_STEP.format(low + first, high + first, low + second, high + second, x + first, x + second, start))
    head = "{ .reg .b32 c0, c1, c2, c3, z; mov.b32 z, 0;\n"
    return head + "\n".join(steps) + _ENDS, ",".join(["=f"] * 8 + ["r"] * (12 * halves))


_MMA4, _MMA4_OPERANDS = (tl.constexpr(text) for text in _assembly(4))
_MMA8, _MMA8_OPERANDS = (tl.constexpr(text) for text in _assembly(8))


@triton.jit
def _emulated(a, x, S: tl.constexpr):
    """Σ over columns of a [16, S · 8 rows] · x [16, S · 8 planes], byte by byte: int32 [S, 8 planes, 8 rows]."""
    a = a.reshape(16, S, 1, 8)
    x = x.reshape(16, S, 8, 1)
    return tl.sum(_dot4(a, x, a * 0 + x * 0, True), axis=0)


@triton.jit
def _placed(c, S: tl.constexpr):
    """c [S, 8 planes, 8 rows] as the tensor core leaves it: both planes of token t at 4·t of float32 [16, S · 8]."""
    plane = tl.arange(0, 2)[None, None, :, None]
    both = tl.sum(c.reshape(S, 4, 2, 8) * tl.where(plane == 0, 254, 1), axis=2)  # [S, 4, 8]
    at = tl.arange(0, 4)[None, :, None, None]
    return tl.where(at == 0, tl.permute(both, 1, 0, 2)[:, None], 0).reshape(16, S * 8).to(tl.float32)


@triton.jit
def _products(w, v, x0, x1, BITS: tl.constexpr, S: tl.constexpr, EMULATE: tl.constexpr):
    """Words of rows g and of rows g + 8, [16, S · 8], by the planes of four tokens: float32 [16, S · 8] each."""
    if BITS == 4:
        a0 = _open(w, w, w, 0, BITS)
        a1 = _open(w, w, w, 1, BITS)
        b0 = _open(v, v, v, 0, BITS)
        b1 = _open(v, v, v, 1, BITS)
        if EMULATE:
            y = _placed(_emulated(a0, x0, S) + _emulated(a1, x1, S), S)
            z = _placed(_emulated(b0, x0, S) + _emulated(b1, x1, S), S)
        else:
            y, z = tl.inline_asm_elementwise(
                _MMA4, _MMA4_OPERANDS, [a0, a1, b0, b1, x0, x1], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
            )
    else:
        a0 = _open(w, w, w, 0, BITS)
        b0 = _open(v, v, v, 0, BITS)
        if EMULATE:
            y = _placed(_emulated(a0, x0, S), S)
            z = _placed(_emulated(b0, x0, S), S)
        else:
            y, z = tl.inline_asm_elementwise(
                _MMA8, _MMA8_OPERANDS, [a0, b0, x0], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
            )
    return y, z


@triton.jit
def _tile(w_ptr, s_ptr, rows, column, COLS: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, C: tl.constexpr):
    """Words [16, S · 8] of ``rows`` from ``column`` on, and their scale in the first of each four, zero elsewhere."""
    i = tl.arange(0, 16)[:, None]
    w = tl.load(w_ptr + rows * COLS + column + i, mask=column + i < COLS, other=0, eviction_policy="evict_first")
    s = tl.load(s_ptr + rows * GROUPS + column * C // G + i * 0, mask=(i % 4 == 0) & (column < COLS), other=0.0)
    return w, s.to(tl.float32)


@triton.jit(do_not_specialize=["N", "M"])
def batch(
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
    FOURS: tl.constexpr,
    S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """y[m, n] = Σₖ s[n, k // G] · (code[n, k] − 2^(BITS−1)) · x[m, k] + bias[n] for M ≤ 4·FOURS tokens.

    w int32 [N, COLS], 8 or 4 bits; s bfloat16 [N, K/G], G a multiple of the 16 columns of a tile or K; q int32
    [M, 2, C/4, XC] and xs float32 [M, tiles], one scale for a tile, as ``quantize`` writes them with FOLD = 2^(BITS−8);
    y float32 [M, N]. A program owns 16 rows; its S warps share the tiles out between them.
    """
    C: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = (K + C - 1) // C
    TILES: tl.constexpr = (COLS + 15) // 16
    STEPS: tl.constexpr = (TILES + S - 1) // S
    GROUPS: tl.constexpr = K // G
    PLANE: tl.constexpr = C // 4 * XC
    g = (tl.arange(0, S * 8) % 8)[None, :]
    warp = (tl.arange(0, S * 8) // 8)[None, :]
    i = tl.arange(0, 16)[:, None]
    here = tl.program_id(0) * 16
    low = tl.minimum(here + g, N - 1)
    high = tl.minimum(here + 8 + g, N - 1)

    zero = tl.zeros([16, S * 8], dtype=tl.float32)
    y0 = zero
    y1 = zero
    y2 = zero
    y3 = zero
    z0 = zero
    z1 = zero
    z2 = zero
    z3 = zero
    w, s = _tile(w_ptr, s_ptr, low, warp * 16, COLS, GROUPS, G, C)
    v, u = _tile(w_ptr, s_ptr, high, warp * 16, COLS, GROUPS, G, C)
    for step in tl.range(0, STEPS, num_stages=1):
        tile = step * S + warp
        column = tile * 16
        w_next, s_next = _tile(w_ptr, s_ptr, low, column + S * 16, COLS, GROUPS, G, C)
        v_next, u_next = _tile(w_ptr, s_ptr, high, column + S * 16, COLS, GROUPS, G, C)
        for four in tl.static_range(FOURS):
            x = q_ptr + (four * 8 + g) * PLANE + column + i
            there = (four * 8 + g < 2 * M) & (column + i < COLS)
            x0 = tl.load(x, mask=there, other=0)
            x1 = x0
            if BITS == 4:
                x1 = tl.load(x + XC, mask=there, other=0)
            token = four * 4 + i // 4
            scale = tl.load(xs_ptr + token * TILES + tile, mask=(i % 4 == 0) & (token < M) & (tile < TILES), other=0.0)
            y, z = _products(w, v, x0, x1, BITS, S, EMULATE)
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
        w, s, v, u = w_next, s_next, v_next, u_next

    for four in tl.static_range(FOURS):
        if four == 0:
            _store(y0, z0, bias_ptr, y_ptr, here, 0, N, M, S, HAS_BIAS)
        elif four == 1:
            _store(y1, z1, bias_ptr, y_ptr, here, 4, N, M, S, HAS_BIAS)
        elif four == 2:
            _store(y2, z2, bias_ptr, y_ptr, here, 8, N, M, S, HAS_BIAS)
        else:
            _store(y3, z3, bias_ptr, y_ptr, here, 12, N, M, S, HAS_BIAS)


@triton.jit
def _store(y, z, bias_ptr, y_ptr, here, first: tl.constexpr, N, M, S: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums over warps and empty places of y and z [16, S · 8], into rows here … + 7 and + 8 … + 15 of four tokens."""
    token = first + tl.arange(0, 4)[:, None]
    g = tl.arange(0, 8)[None, :]
    for half in tl.static_range(2):
        sums = tl.sum(tl.sum((z if half else y).reshape(4, 4, S, 8), axis=1), axis=1)
        row = here + 8 * half + g
        if HAS_BIAS:
            sums += tl.load(bias_ptr + row, mask=row < N, other=0.0)
        tl.store(y_ptr + token * N + row, sums, mask=(token < M) & (row < N))
