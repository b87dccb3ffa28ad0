# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of one decode step's projections: a matrix-vector product and what follows it, in one launch.

The residual stream reaches a projection as int8 planes of x ⊙ w, w the norm's weights, and as sums of squares of x, one
for 32 elements. Planes have a scale for each 32 elements, so they need no more of x than those; 1/√(mean(x²) + eps) is
a factor of the result. So whoever writes 32 elements of x can write their planes, and no kernel normalises.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.arrivals import arrived, let_in, take_turn
from lbq.runtime.kernels.gemv.triton import (
    activations,
    call_rows,
    call_share,
    first_weights,
    load_weights,
    row_products,
    store_planes,
    whole_rows,
)
from lbq.runtime.kernels.planes.triton import activate, norm_blocks, store_normed


@triton.jit
def _spread(y, R: tl.constexpr):
    """``y`` [R] as it is, in a layout of its own: a block of 32 in one warp, which sums it without barriers.

    Rows lie in the warps that multiplied them. A split, of which the product of "gated" has one anyway, ends that.
    """
    even, odd = tl.split(y.reshape(R // 2, 2))
    return tl.join(even, odd).reshape(R)


@triton.jit
def _squares(squares_ptr, K: tl.constexpr, SIZE: tl.constexpr = 32):
    """The sums of squares of x [K], [⌈K/SIZE⌉] padded with zeros: their sum / K is the mean square."""
    BLOCKS: tl.constexpr = (K + SIZE - 1) // SIZE
    b = tl.arange(0, triton.next_power_of_2(BLOCKS))
    return tl.load(squares_ptr + b, mask=b < BLOCKS, other=0.0)


@triton.jit
def _hand_on(
    y,
    norm,
    block,
    q_ptr,
    s_ptr,
    squares_ptr,
    N,
    C: tl.constexpr,
    XC: tl.constexpr,
    FOLD: tl.constexpr,
    KIND: tl.constexpr,
    BB: tl.constexpr,
):
    if KIND == "add":
        store_normed(y, norm, block, q_ptr, s_ptr, squares_ptr, N, XC, C, FOLD, BB)
    else:
        store_planes(y, block, q_ptr, s_ptr, (N + 31) // 32, XC, C, FOLD, BB)


@triton.jit
def _row(first, e, N, KIND: tl.constexpr):
    """The row of W that is the ``e``-th behind output ``first``: a gate's and its up's side by side."""
    return tl.minimum(first + e // 2, N - 1) + e % 2 * N if KIND == "gated" else tl.minimum(first + e, N - 1)


@triton.jit(do_not_specialize=["N", "NEXT_ROWS"])
def project(
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
    next_ptr,
    N,
    NEXT_ROWS,
    K: tl.constexpr,
    G: tl.constexpr,
    BITS: tl.constexpr,
    XC: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    C_OUT: tl.constexpr,
    XC_OUT: tl.constexpr,
    FOLD_OUT: tl.constexpr,
    PDL: tl.constexpr,
    ONWARD: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
    NEXT_PITCH: tl.constexpr,
    NEXT_LINES: tl.constexpr,
    NEXT_SHARE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """A projection of one token on packed weights, y = W·x + bias, with x normalised after the fact if NORMED.

    KIND "store": y [N] is stored. "add": it is added to the residual stream ``y_ptr`` [N]. "gated": W has 2N rows, gate
    then up, and y = act(gate) · up [N]. A program owns BN rows; "gated" takes half of them from each part.

    With C_OUT, planes of the result (for "add": of the stream ⊙ norm, and its squares) are written for the next
    projection: by the program itself where it owns whole blocks of 32 outputs, else by the last to arrive of those
    that share a block, through ``y_ptr``.

    With PDL and NEXT_SHARE, lines of the weights that the next projection will read are called into L2 meanwhile.
    """
    let_in(PDL, ONWARD)
    R: tl.constexpr = BN // 2 if KIND == "gated" else BN  # outputs of a program
    first = tl.program_id(0) * R
    out = first + tl.arange(0, R)
    rows = _row(first, tl.arange(0, BN), N, KIND)
    if G == K:
        row_scale = tl.load(s_ptr + rows).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows)
    BLOCKS: tl.constexpr = R // 32 if R % 32 == 0 else 1
    block = first // 32 + tl.arange(0, BLOCKS)
    norm = 0.0
    if KIND == "add" and C_OUT > 0:
        norm = norm_blocks(norm_ptr, block, N)
    # With PDL the first weights are under way before the wait for the kernel that makes the activations; the wait
    # stands before the loop, because Triton 3.7.1 moves loads over one inside.
    begun, second = first_weights(w_ptr, s_ptr, rows, K, G, BITS, BW, PDL and AHEAD, EARLY)
    if PDL and NEXT_SHARE > 0:
        call_share(next_ptr, NEXT_ROWS, NEXT_PITCH, NEXT_LINES, NEXT_SHARE)
    take_turn(PDL, ONWARD)
    if NORMED:
        squares = _squares(squares_ptr, K)
    if KIND == "add":
        # Not through L1, which may hold the line from before other programs wrote their part of it.
        stream = tl.load(y_ptr + out, mask=out < N, other=0.0, cache_modifier=".cg")
    y = row_products(begun, second, w_ptr, s_ptr, q_ptr, xs_ptr, rows, K, G, BITS, XC, BN, BW, EARLY, EMULATE)
    if G == K:
        y *= row_scale
    if NORMED:
        y *= tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
    if HAS_BIAS:
        y += bias
    if KIND == "gated":
        gate, up = tl.split(y.reshape(R, 2))
        y = activate(gate, ACTIVATION) * up
    if KIND == "add":
        y += stream

    if C_OUT == 0:
        tl.store(y_ptr + out, y, mask=out < N)
    elif R % 32 == 0:
        y = tl.where(out < N, y, 0.0)
        if KIND == "add":
            tl.store(y_ptr + out, y, mask=out < N)
            y = _spread(y, R)
        y = y.reshape(BLOCKS, 32)
        _hand_on(y, norm, block, q_out_ptr, s_out_ptr, squares_out_ptr, N, C_OUT, XC_OUT, FOLD_OUT, KIND, BLOCKS)
    else:
        tl.store(y_ptr + out, y, mask=out < N)
        shared = first // 32
        if arrived(arrivals_ptr, shared, (tl.minimum(N - shared * 32, 32) + R - 1) // R):
            e = block[:, None] * 32 + tl.arange(0, 32)[None, :]
            whole = tl.load(y_ptr + e, mask=e < N, other=0.0, cache_modifier=".cg")
            _hand_on(whole, norm, block, q_out_ptr, s_out_ptr, squares_out_ptr, N, C_OUT, XC_OUT, FOLD_OUT, KIND, 1)


@triton.jit(do_not_specialize=["N", "NEXT_ROWS"])
def stream(
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
    next_ptr,
    N,
    NEXT_ROWS,
    K: tl.constexpr,
    G: tl.constexpr,
    BITS: tl.constexpr,
    XC: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    C_OUT: tl.constexpr,
    XC_OUT: tl.constexpr,
    FOLD_OUT: tl.constexpr,
    PDL: tl.constexpr,
    ONWARD: tl.constexpr,
    AHEAD: tl.constexpr,
    ROUNDS: tl.constexpr,
    NEXT_PITCH: tl.constexpr,
    NEXT_LINES: tl.constexpr,
    NEXT_SHARE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """As ``project``, by programs that go through ROUNDS · BN rows, BN whole rows of at most BW columns at a time: the
    activations stay in registers, and the next rows are loaded while these are multiplied.
    """
    let_in(PDL, ONWARD)
    C: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    PITCH: tl.constexpr = (K + C - 1) // C * (3 if BITS == 3 else 1)
    R: tl.constexpr = BN // 2 if KIND == "gated" else BN  # outputs of a round
    ALL: tl.constexpr = R * ROUNDS
    first = tl.program_id(0) * ALL
    e = tl.arange(0, BN)
    rows = _row(first, e, N, KIND)
    BLOCKS: tl.constexpr = ALL // 32 if ALL % 32 == 0 else 1
    block = first // 32 + tl.arange(0, BLOCKS)
    norm = 0.0
    if KIND == "add" and C_OUT > 0:
        norm = norm_blocks(norm_ptr, block, N)
    loaded = load_weights(w_ptr + rows[None, :] * PITCH, s_ptr + rows[None, :] * (K // G), 0, K, G, BITS, BW)
    if PDL:
        if AHEAD:
            call_rows(w_ptr, _row(first, tl.arange(0, BN * ROUNDS), N, KIND), PITCH, 0)
        if NEXT_SHARE > 0:
            call_share(next_ptr, NEXT_ROWS, NEXT_PITCH, NEXT_LINES, NEXT_SHARE)
    take_turn(PDL, ONWARD)
    x, x_scale = activations(q_ptr, xs_ptr, K, BITS, XC, BW)
    factor = 1.0
    if NORMED:
        factor = tl.rsqrt(tl.sum(_squares(squares_ptr, K), axis=0) / K + EPS)
    for t in tl.static_range(ROUNDS):
        if t + 1 < ROUNDS:
            following = _row(first + (t + 1) * R, e, N, KIND)
            ahead = load_weights(
                w_ptr + following[None, :] * PITCH, s_ptr + following[None, :] * (K // G), 0, K, G, BITS, BW
            )
        rows = _row(first + t * R, e, N, KIND)
        out = first + t * R + tl.arange(0, R)
        if G == K:
            row_scale = tl.load(s_ptr + rows).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + rows)
        if KIND == "add":
            # Not through L1, which may hold the line from before other programs wrote their part of it.
            streamed = tl.load(y_ptr + out, mask=out < N, other=0.0, cache_modifier=".cg")
        y = whole_rows(loaded, x, x_scale, BITS, BN, BW, EMULATE) * factor
        if G == K:
            y *= row_scale
        if HAS_BIAS:
            y += bias
        if KIND == "gated":
            gate, up = tl.split(y.reshape(R, 2))
            y = activate(gate, ACTIVATION) * up
        if KIND == "add":
            y += streamed
        tl.store(y_ptr + out, y, mask=out < N)
        if t + 1 < ROUNDS:
            loaded = ahead

    if C_OUT > 0:
        if ALL % 32 == 0:
            tl.debug_barrier()
            complete = True
        else:
            shared = first // 32
            complete = arrived(arrivals_ptr, shared, (tl.minimum(N - shared * 32, 32) + ALL - 1) // ALL)
        if complete:
            at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
            whole = tl.load(y_ptr + at, mask=at < N, other=0.0, cache_modifier=".cg")
            _hand_on(
                whole, norm, block, q_out_ptr, s_out_ptr, squares_out_ptr, N, C_OUT, XC_OUT, FOLD_OUT, KIND, BLOCKS
            )


@triton.jit(do_not_specialize=["N", "M"])
def project_dense(
    x_ptr,
    norm_ptr,
    squares_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    N,
    M,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [M, N] = W·(norm ⊙ x)/√(mean(x²) + EPS) + bias in float32; W [N, K] of a 16-bit type: a head that stayed dense.

    A program owns BN rows and one of M tokens, which vary fastest: they share L2. Squares are of SIZE elements each.
    """
    let_in(PDL, True)
    m = tl.program_id(0) % M
    x_ptr += m * K
    squares_ptr += m * ((K + SIZE - 1) // SIZE)
    rows = tl.program_id(0) // M * BN + tl.arange(0, BN)
    safe = tl.minimum(rows, N - 1)
    w_row = w_ptr + safe[None, :].to(tl.int64) * K
    if HAS_BIAS:
        bias = tl.load(bias_ptr + safe)
    acc = tl.zeros([BK, BN], dtype=tl.float32)
    k = tl.arange(0, BK)
    w = tl.load(w_row + k[:, None], mask=(k < K)[:, None], other=0.0, eviction_policy="evict_first")
    take_turn(PDL, True)
    squares = _squares(squares_ptr, K, SIZE)
    for k0 in tl.static_range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if k0 + BK < K:
            ahead = k + BK
            w_ahead = tl.load(
                w_row + ahead[:, None], mask=(ahead < K)[:, None], other=0.0, eviction_policy="evict_first"
            )
        x = tl.load(x_ptr + k, mask=k < K, other=0.0) * tl.load(norm_ptr + k, mask=k < K, other=0.0)
        acc += w.to(tl.float32) * x[:, None]
        if k0 + BK < K:
            w = w_ahead
    y = tl.sum(acc, axis=0) * tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)
    if HAS_BIAS:
        y += bias
    tl.store(y_ptr + m * N + rows, y, mask=rows < N)
