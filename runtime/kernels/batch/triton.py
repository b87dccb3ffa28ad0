# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005 — tuples grow while a kernel is compiled, by + alone
"""Triton kernel of a few tokens' product with packed weights: one pass over the weights, int8 tensor cores.

``mma.m16n8k32`` multiplies 16 rows by 8 columns; here the columns are the two int8 planes of four tokens. Its operands
lie in registers as a load of 16 bytes a thread leaves them: of a warp's 32 threads four read 64 bytes of a row, and the
eight groups of four read eight rows, which is how the instruction wants its first operand, but for the order along K,
and the activations are read in the same order. So weights go from memory through an operation or two into the tensor
core, with no shuffle and no shared memory. That rests on the layout that Triton gives a tile [16, 8 · warps] whose
first axis is contiguous; ``test_compile`` checks it. The second axis is the warp and the row: some warps have the same
rows and share their tiles out between them, others have other rows.

Scales, of which a thread wants a few where it has sixteen bytes of words, are loaded by assembly: Triton would choose
another layout for them, and take them to this one through shared memory.

Where a group of weights is a half or a quarter of a tile, so are the threads of a row: there is an instruction for each
of the parts then, with the other threads' activations zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.arrivals import arrived, let_in, take_turn
from lbq.runtime.kernels.gemv.triton import _dot4, open_codes, store_planes
from lbq.runtime.kernels.planes.triton import activate, norm_blocks, store_normed

# Rows g and g + 8 of four words each, opened into bytes of one or two halves; planes of four tokens; the scales of both
# rows' parts, and those of tokens; what was summed before. A thread's four results a row are those of four fours of
# tokens, and the assembly adds to one of them.
_STEP = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{c0,c1,c2,c3}}, {{${},${},${},${}}}, {{{},{}}}, {};"
_ADDED = """mul.f32 r, ${0}, ${1}; mad.lo.s32 {2}, {2}, 254, {3}; cvt.rn.f32.s32 f, {2};
fma.rn.f32 ${4}, f, r, ${5};"""


def _assembly(bits: int, parts: int, four: int) -> tuple[str, str]:
    """The products of one tile and a four of tokens: PTX and its constraints. Operands from $8 on: the opened words of
    rows g, then of rows g + 8, then of the planes, at 4 bits first the low nibbles' of all four, then the high ones';
    four registers each of the scales of rows g and of rows g + 8, a part in each, and of tokens, a four in each; and
    the sums of rows g and of rows g + 8. Results are written while operands are still to be read ("&").
    """
    halves = 8 // bits  # registers that a word opens into
    low, high, x = 8, 8 + 4 * halves, 8 + 8 * halves
    scales, other_scales, tokens, sums = (8 + 12 * halves + 4 * i for i in range(4))
    lines = ["{ .reg .b32 c0, c1, c2, c3, z, t, p, q; .reg .f32 f, r; .reg .pred here; mov.b32 z, 0;"]
    if parts > 1:
        lines.append("mov.u32 t, %laneid; and.b32 t, t, 3;")
    for part in range(parts):
        if parts > 1:  # which of the four threads of a row have it
            lines.append(f"shr.u32 p, t, {2 // parts}; setp.eq.u32 here, p, {part};")
        for i in range(2 * halves):  # of 8 bytes of a row a thread
            one, two = 2 * i, 2 * i + 1
            xs = [f"${x + one}", f"${x + two}"]
            if parts > 1:
                lines.append(f"selp.b32 p, {xs[0]}, 0, here; selp.b32 q, {xs[1]}, 0, here;")
                xs = ["p", "q"]
            start = "{c0,c1,c2,c3}" if i else "{z,z,z,z}"
            lines.append(_STEP.format(low + one, high + one, low + two, high + two, *xs, start))
        for first, scale, *planes in ((0, scales, "c0", "c1"), (4, other_scales, "c2", "c3")):
            result = first + four
            before = result if part else sums + result
            lines.append(_ADDED.format(scale + part, tokens + four, *planes, result, before))
    lines += [f"mov.b32 ${i}, ${sums + i};" for i in range(8) if i % 4 != four]
    return "\n".join([*lines, "}"]), ",".join(["=&f"] * 8 + ["r"] * (12 * halves) + ["f"] * 20)


def _scale_assembly(bits: int, count: int) -> str:
    """Loads of ``count`` bfloat16 or float32 into the first of four registers, and zeros into the others."""
    load = "ld.global.b16 h, [${1}]; mov.b32 ${0}, {{z, h}};" if bits == 16 else "ld.global.b32 ${0}, [${1}];"
    lines = [load.format(i, 4 + i) if i < count else f"mov.b32 ${i}, 0;" for i in range(4)]
    return "\n".join(["{ .reg .b16 h, z; mov.b16 z, 0;", *lines, "}"])


_WIDTHS = [(4, 1), (4, 2), (4, 4), (8, 1), (8, 2)]  # bits, parts
_ADD = tl.constexpr({(*way, four): _assembly(*way, four)[0] for way in _WIDTHS for four in range(4)})
_ADD_OPERANDS = tl.constexpr({bits: _assembly(bits, 1, 0)[1] for bits in (4, 8)})
_SCALES = tl.constexpr({(bits, count): _scale_assembly(bits, count) for bits in (16, 32) for count in (1, 2, 4)})


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
def _added(
    y, z, opened, x0, x1, s, u, xs, FOUR: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Sums of rows g, y, and of rows g + 8, z, float32 [16, W · 8], with a tile's products by the planes of the FOURth
    four tokens added at FOUR of each four: that of token 4 · FOUR + t is at 4 · t + FOUR."""
    a0, a1, b0, b1 = opened
    if EMULATE:
        c = _emulated(a0, x0, W, PARTS)
        d = _emulated(b0, x0, W, PARTS)
        if BITS == 4:
            c += _emulated(a1, x1, W, PARTS)
            d += _emulated(b1, x1, W, PARTS)
        here = (tl.arange(0, 16) % 4 == FOUR)[:, None]
        scale = tl.sum(tl.where(here, xs, 0.0).reshape(4, 4, W * 8), axis=1)[:, None, :]
        c = tl.sum((_placed(c, W, PARTS) * s).reshape(4, 4, W * 8), axis=1)[:, None, :]
        d = tl.sum((_placed(d, W, PARTS) * u).reshape(4, 4, W * 8), axis=1)[:, None, :]
        y += tl.where(here, (c * scale).broadcast_to(4, 4, W * 8).reshape(16, W * 8), 0.0)
        z += tl.where(here, (d * scale).broadcast_to(4, 4, W * 8).reshape(16, W * 8), 0.0)
    elif BITS == 4:
        y, z = tl.inline_asm_elementwise(
            _ADD[4, PARTS, FOUR], _ADD_OPERANDS[4], [a0, a1, b0, b1, x0, x1, s, u, xs, y, z],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        y, z = tl.inline_asm_elementwise(
            _ADD[8, PARTS, FOUR], _ADD_OPERANDS[8], [a0, b0, x0, s, u, xs, y, z],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    return y, z


@triton.jit
def _scales(ptr, behind, BITS: tl.constexpr, COUNT: tl.constexpr, EMULATE: tl.constexpr):
    """float32 [16, ·] of COUNT in each four of ``ptr`` [16, ·], not before ``behind``; zero elsewhere."""
    if EMULATE:
        s = tl.load(ptr, mask=(tl.arange(0, 16) % 4 < COUNT)[:, None], other=0.0).to(tl.float32)
    else:
        s = tl.inline_asm_elementwise(
            _SCALES[BITS, COUNT], "=f,=f,=f,=f,l,l,l,l,r,r,r,r", [ptr.to(tl.int64), behind],
            dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    return s


@triton.jit
def _weights(
    ats, part, step: tl.constexpr, first, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Of tile ``part`` + S · (``first`` + ``step``), for each of R blocks of rows: words [16, W · 8] of both halves of
    a block, zero past a row's end, and their scales, that of part p of the tile at p of each four. ``ats`` are where
    tile ``part`` of these begins, and where the rows' scales do. WHOLE: no tile of a row is cut, or past its end."""
    C: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = (K + C - 1) // C
    i = tl.arange(0, 16)[:, None]
    TILES: tl.constexpr = 1 if PARTS > 1 else G // (16 * C) if G < K else 1  # under one scale
    if G == K:
        group = part * 0 + i * 0
    elif PARTS > 1:
        group = (part + first * S) * PARTS + i % 4 + step * S * PARTS
    elif S % TILES == 0:
        group = part // TILES + first * (S // TILES) + i * 0 + step * S // TILES
    else:
        group = (part + first * S + step * S) // TILES + i * 0
    if not WHOLE:
        group = tl.minimum(group, K // G - 1)
    found = ()
    for block in tl.static_range(R):
        w_at, v_at, s_at, u_at = ats[block]
        # What is known while compiling stands by itself: it becomes part of the instruction.
        w_at += first * (S * 16)
        v_at += first * (S * 16)
        if WHOLE:
            w = tl.load(w_at + step * S * 16, eviction_policy="evict_first")
            v = tl.load(v_at + step * S * 16, eviction_policy="evict_first")
        else:
            inside = (part + first * S + step * S) * 16 + i < COLS
            w = tl.load(w_at + step * S * 16, mask=inside, other=0, eviction_policy="evict_first")
            v = tl.load(v_at + step * S * 16, mask=inside, other=0, eviction_policy="evict_first")
        s = _scales(s_at + group, i + part, 16, PARTS, EMULATE)
        u = _scales(u_at + group, i + part, 16, PARTS, EMULATE)
        found = found + ((w, v, s, u),)
    return found


@triton.jit
def _planes(
    x_at, xs_at, part, step: tl.constexpr, first, K: tl.constexpr, BITS: tl.constexpr, XC: tl.constexpr,
    FOURS: tl.constexpr, S: tl.constexpr, WHOLE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Planes [16, W · 8] of every four tokens in the same tile, at 4 bits the two that low and high nibbles meet, and
    tokens' scales. They are at ``x_at`` and ``xs_at`` for tile ``part``."""
    C: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = (K + C - 1) // C
    TILES: tl.constexpr = (COLS + 15) // 16
    x = ()
    for four in tl.static_range(FOURS):
        at = x_at[four] + first * (S * 16) + step * S * 16
        if WHOLE:
            x0 = tl.load(at)
            x1 = tl.load(at + XC) if BITS == 4 else x0
        else:
            inside = (part + first * S + step * S) * 16 + tl.arange(0, 16)[:, None] < COLS
            x0 = tl.load(at, mask=inside, other=0)
            x1 = tl.load(at + XC, mask=inside, other=0) if BITS == 4 else x0
        x = x + (x0, x1)
    ahead = first * S + step * S if WHOLE else tl.minimum(part + first * S + step * S, TILES - 1) - part
    return x, _scales(xs_at + ahead, x[0], 32, FOURS, EMULATE)


@triton.jit
def _times(
    sums, weights, tokens, BITS: tl.constexpr, R: tl.constexpr, FOURS: tl.constexpr, W: tl.constexpr,
    PARTS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """``_added`` for all blocks of rows and fours of tokens."""
    x, xs = tokens
    found = ()
    for block in tl.static_range(R):
        w, v, s, u = weights[block]
        y = sums[2 * block]
        z = sums[2 * block + 1]
        a0 = open_codes(w, w, w, 0, BITS, EMULATE)
        b0 = open_codes(v, v, v, 0, BITS, EMULATE)
        a1 = a0
        b1 = b0
        if BITS == 4:
            a1 = open_codes(w, w, w, 1, BITS, EMULATE)
            b1 = open_codes(v, v, v, 1, BITS, EMULATE)
        for four in tl.static_range(FOURS):
            y, z = _added(
                y, z, (a0, a1, b0, b1), x[2 * four], x[2 * four + 1], s, u, xs, four, BITS, W, PARTS, EMULATE
            )  # fmt: skip
        found = found + (y, z)
    return found


@triton.jit
def _gathered(y, z, FOURS: tl.constexpr, W: tl.constexpr):
    """Sums of both halves of a block's rows, as ``_added`` leaves them: [4 tokens, FOURS, W · 8, 2]."""
    # Fours that are not there have sums of zero.
    y = tl.sum(y.reshape(4, 4 // FOURS, FOURS, W * 8), axis=1)
    z = tl.sum(z.reshape(4, 4 // FOURS, FOURS, W * 8), axis=1)
    return tl.join(y, z)


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
    R: tl.constexpr,
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
    ONWARD: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """y[m, n] = Σₖ s[n, k // G] · (code[n, k] − 2^(BITS−1)) · x[m, k] + bias[n] for M ≤ 4 · FOURS tokens.

    w int32 [rows, COLS], 8 or 4 bits; s bfloat16 [rows, K/G], G a multiple of the 16 columns of a tile, a half or a
    quarter of it, or K; q int32 [M, 2, C/4, XC] and xs float32 [M, tiles], one scale for a tile, as ``quantize`` writes
    them with FOLD = 2^(BITS−8); FOURS 1, 2 or 4. x is normalised after the fact if NORMED, by its squares [M, tiles].

    KIND "store": y float32 [M, N] is stored, of N rows. "add": it is added to the residual stream ``y_ptr`` [M, N].
    "gated": there are 2N rows, gate then up, and y = act(gate) · up [M, N].

    A program of S · T warps owns R · T blocks of 16 rows, eight gates and their ups if "gated". A warp multiplies R of
    them, 1 or 2, by the same activations; S warps share the tiles of these out between them, and have those of DEPTH
    steps in registers ahead.

    With C_OUT, planes of the result (for "add": of the stream ⊙ norm, and its squares), a scale for SIZE_OUT elements,
    are written for the next projection: by the program itself where it owns whole such blocks, else by the last to
    arrive of those that share one.
    """
    let_in(PDL, ONWARD)
    C: tl.constexpr = 32 // BITS
    COLS: tl.constexpr = (K + C - 1) // C
    TILES: tl.constexpr = (COLS + 15) // 16
    STEPS: tl.constexpr = (TILES + S - 1) // S
    WHOLE: tl.constexpr = COLS % 16 == 0 and TILES % S == 0
    HELD: tl.constexpr = DEPTH if DEPTH < STEPS else STEPS
    ROUNDS: tl.constexpr = STEPS // HELD
    REST: tl.constexpr = STEPS % HELD
    LAST: tl.constexpr = (ROUNDS - 1) * HELD  # the last round's first step
    PARTS: tl.constexpr = 1 if (G == K or G % (16 * C) == 0) else 16 * C // G
    W: tl.constexpr = S * T
    OUT_ROWS: tl.constexpr = 8 if KIND == "gated" else 16
    OUTPUTS: tl.constexpr = R * T * OUT_ROWS
    g = (tl.arange(0, W * 8) % 8)[None, :]
    warp = (tl.arange(0, W * 8) // 8)[None, :]
    part = warp % S
    i = tl.arange(0, 16)[:, None]
    here = tl.program_id(0) * OUTPUTS
    ats = ()
    for block in tl.static_range(R):
        low = here + (warp // S * R + block) * OUT_ROWS + g
        high = tl.minimum(low, N - 1) + N if KIND == "gated" else tl.minimum(low + 8, N - 1)
        low = tl.minimum(low, N - 1)
        ats = ats + (
            (
                w_ptr + (low * COLS + part * 16 + i),
                w_ptr + (high * COLS + part * 16 + i),
                s_ptr + low * (K // G),
                s_ptr + high * (K // G),
            ),
        )
    weights = ()
    for step in tl.static_range(HELD):
        weights = weights + (_weights(ats, part, step, 0, K, G, BITS, R, S, PARTS, WHOLE, EMULATE),)
    # What the results go on by, in the order in which they will be found: [4 tokens, FOURS, T, 8 rows, R] of gates,
    # else with an axis of the two halves of a block's rows behind these.
    token = tl.arange(0, 4)[:, None] + 4 * tl.arange(0, FOURS)[None, :]
    row = here + tl.arange(0, T)[:, None, None] * (R * OUT_ROWS) + tl.arange(0, 8)[None, :, None]
    row += tl.arange(0, R)[None, None, :] * OUT_ROWS
    if KIND == "gated":
        out = y_ptr + token[:, :, None, None, None] * N + row[None, None]
        inside = (token < M)[:, :, None, None, None] & (row < N)[None, None]
        if HAS_BIAS:
            gate_bias = tl.load(bias_ptr + row, mask=row < N, other=0.0)[None, None]
            up_bias = tl.load(bias_ptr + N + row, mask=row < N, other=0.0)[None, None]
    else:
        row = row[:, :, :, None] + tl.arange(0, 2)[None, None, None, :] * 8
        out = y_ptr + token[:, :, None, None, None, None] * N + row[None, None]
        inside = (token < M)[:, :, None, None, None, None] & (row < N)[None, None]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row, mask=row < N, other=0.0)[None, None]
    take_turn(PDL, ONWARD)
    if NORMED:
        BLOCKS: tl.constexpr = (K + 16 * C - 1) // (16 * C)
        b = tl.arange(0, triton.next_power_of_2(BLOCKS))[None, None, :]
        squares = tl.load(squares_ptr + tl.minimum(token, M - 1)[:, :, None] * BLOCKS + b, mask=b < BLOCKS, other=0.0)
    if KIND == "add":
        # Not through L1, which may hold the line from before other programs wrote their part of it.
        stream = tl.load(out, mask=inside, other=0.0, cache_modifier=".cg")

    sums = ()
    for _block in tl.static_range(2 * R):
        sums = sums + (tl.zeros([16, W * 8], dtype=tl.float32),)
    # The last token stands in for those past it; nothing of theirs is stored.
    x_at = ()
    for four in tl.static_range(FOURS):
        x_at = x_at + (q_ptr + (tl.minimum(four * 8 + g, 2 * M - 1) * (C // 4 * XC) + part * 16 + i),)
    xs_at = xs_ptr + (tl.minimum(i % 4 * 4 + i // 4, M - 1) * TILES + part)
    # What a round loads is used in the next: within one, compilers put off loads until just before their use.
    tokens = ()
    for step in tl.static_range(HELD):
        tokens = tokens + (_planes(x_at, xs_at, part, step, 0, K, BITS, XC, FOURS, S, WHOLE, EMULATE),)
    for first in tl.range(0, LAST, HELD, num_stages=1):
        weights_next = ()
        tokens_next = ()
        for step in tl.static_range(HELD):
            weights_next = weights_next + (
                _weights(ats, part, step + HELD, first, K, G, BITS, R, S, PARTS, WHOLE, EMULATE),
            )
            tokens_next = tokens_next + (
                _planes(x_at, xs_at, part, step + HELD, first, K, BITS, XC, FOURS, S, WHOLE, EMULATE),
            )
            sums = _times(sums, weights[step], tokens[step], BITS, R, FOURS, W, PARTS, EMULATE)
        weights = weights_next
        tokens = tokens_next
    for step in tl.static_range(HELD + REST):
        if step < REST:
            weights = weights + (_weights(ats, part, LAST + HELD + step, 0, K, G, BITS, R, S, PARTS, WHOLE, EMULATE),)
            tokens = tokens + (
                _planes(x_at, xs_at, part, LAST + HELD + step, 0, K, BITS, XC, FOURS, S, WHOLE, EMULATE),
            )
        sums = _times(sums, weights[step], tokens[step], BITS, R, FOURS, W, PARTS, EMULATE)

    y = _gathered(sums[0], sums[1], FOURS, W)
    if R == 2:
        y = tl.join(y, _gathered(sums[2], sums[3], FOURS, W))  # [4, FOURS, W · 8, halves, R]
    y = tl.sum(tl.permute(y.reshape(4, FOURS, T, S, 8, 2, R), 0, 1, 2, 3, 4, 6, 5), axis=3)
    if NORMED:
        y *= tl.rsqrt(tl.sum(squares, axis=2) / K + EPS)[:, :, None, None, None, None]
    if KIND == "gated":
        gate, up = tl.split(y)
        if HAS_BIAS:
            gate += gate_bias
            up += up_bias
        tl.store(out, activate(gate, ACTIVATION) * up, mask=inside)
    else:
        if HAS_BIAS:
            y += bias
        if KIND == "add":
            y += stream
        tl.store(out, y, mask=inside)
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
