# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels that write tokens' activations as the int8 planes which projections read.

Each program owns BB blocks of SIZE elements of one token, which its second number says. Planes of a normalised vector
are those of x ⊙ w, with the sums of squares of x beside them: see ``project``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lbq.runtime.kernels.arrivals import let_in, take_turn
from lbq.runtime.kernels.gemv.triton import store_planes

_TWO_ROOTS = tl.constexpr(-1.5957691216057308)  # −2·√(2/π)
_HALF_ROOT = tl.constexpr(0.7071067811865476)  # √½


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """float32: "silu", "gelu" by the error function, or "gelu_tanh" by its usual approximation."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * _HALF_ROOT))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        y = x / (1.0 + tl.exp((x + 0.044715 * x * x * x) * _TWO_ROOTS))
    return y


@triton.jit
def norm_blocks(norm_ptr, block, N, SIZE: tl.constexpr = 32):
    """Blocks [·, SIZE] of a norm's weights [N], zero past their end: for ``store_normed``, asked for well before it."""
    e = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(norm_ptr + e, mask=e < N, other=0.0)


@triton.jit
def store_normed(
    x,
    norm,
    block,
    q_ptr,
    s_ptr,
    squares_ptr,
    N,
    XC,
    C: tl.constexpr,
    FOLD: tl.constexpr,
    BB: tl.constexpr,
    SIZE: tl.constexpr = 32,
):
    """Blocks x [BB, SIZE] of a vector [N], zero past its end: planes of x ⊙ norm, and each block's sum of squares."""
    blocks = (N + SIZE - 1) // SIZE
    tl.store(squares_ptr + block, tl.sum(x * x, axis=1), mask=block < blocks)
    store_planes(x * norm, block, q_ptr, s_ptr, blocks, XC, C, FOLD, BB, SIZE)


@triton.jit
def of_token(token, q_ptr, s_ptr, squares_ptr, N, XC, C: tl.constexpr, SIZE: tl.constexpr):
    """Where the planes of ``token`` begin, their scales and the sums of squares, of vectors [N]."""
    blocks = (N + SIZE - 1) // SIZE
    return q_ptr + token * (2 * (C // 4) * XC), s_ptr + token * blocks, squares_ptr + token * blocks


@triton.jit
def embed(
    token_ptr,
    table_ptr,
    x_ptr,
    norm_ptr,
    q_ptr,
    s_ptr,
    squares_ptr,
    N,
    XC,
    C: tl.constexpr,
    FOLD: tl.constexpr,
    BB: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows ``token`` [M] of table [V, N], of a 16-bit type, into the residual stream x float32 [M, N] and normed
    planes."""
    let_in(PDL, True)
    m = tl.program_id(1)
    token = tl.load(token_ptr + m)
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    e = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(table_ptr + token * N + e, mask=e < N, other=0.0).to(tl.float32)
    norm = norm_blocks(norm_ptr, block, N, SIZE)
    take_turn(PDL, True)
    tl.store(x_ptr + m * N + e, x, mask=e < N)
    q_at, s_at, squares_at = of_token(m, q_ptr, s_ptr, squares_ptr, N, XC, C, SIZE)
    store_normed(x, norm, block, q_at, s_at, squares_at, N, XC, C, FOLD, BB, SIZE)


@triton.jit
def norm(
    x_ptr,
    norm_ptr,
    q_ptr,
    s_ptr,
    squares_ptr,
    N,
    XC,
    C: tl.constexpr,
    FOLD: tl.constexpr,
    BB: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
    ONWARD: tl.constexpr,
):
    """The residual stream x float32 [M, N] into normed planes."""
    let_in(PDL, ONWARD)
    m = tl.program_id(1)
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    e = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    norm = norm_blocks(norm_ptr, block, N, SIZE)
    take_turn(PDL, ONWARD)
    x = tl.load(x_ptr + m * N + e, mask=e < N, other=0.0)
    q_at, s_at, squares_at = of_token(m, q_ptr, s_ptr, squares_ptr, N, XC, C, SIZE)
    store_normed(x, norm, block, q_at, s_at, squares_at, N, XC, C, FOLD, BB, SIZE)


@triton.jit
def plain(
    x_ptr,
    q_ptr,
    s_ptr,
    N,
    XC,
    C: tl.constexpr,
    FOLD: tl.constexpr,
    BB: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
    ONWARD: tl.constexpr,
):
    """x float32 [M, N] into planes."""
    let_in(PDL, ONWARD)
    take_turn(PDL, ONWARD)
    m = tl.program_id(1)
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    e = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + m * N + e, mask=e < N, other=0.0)
    q_at, s_at, _ = of_token(m, q_ptr, s_ptr, s_ptr, N, XC, C, SIZE)
    store_planes(x, block, q_at, s_at, (N + SIZE - 1) // SIZE, XC, C, FOLD, BB, SIZE)
