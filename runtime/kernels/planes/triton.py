# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels that write one token's activations as the int8 planes which projections read.

Each program owns BB blocks of 32 elements. Planes of a normalised vector are those of x ⊙ w, with the sums of squares
of x beside them: see ``project``.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def norm_blocks(norm_ptr, block, N):
    """Blocks [·, 32] of a norm's weights [N], zero past their end: for ``store_normed``, asked for well before it."""
    e = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    return tl.load(norm_ptr + e, mask=e < N, other=0.0)


@triton.jit
def store_normed(
    x, norm, block, q_ptr, s_ptr, squares_ptr, N, XC, C: tl.constexpr, FOLD: tl.constexpr, BB: tl.constexpr
):
    """Blocks x [BB, 32] of a vector [N], zero past its end: planes of x ⊙ norm, and each block's sum of squares."""
    blocks = (N + 31) // 32
    tl.store(squares_ptr + block, tl.sum(x * x, axis=1), mask=block < blocks)
    store_planes(x * norm, block, q_ptr, s_ptr, blocks, XC, C, FOLD, BB)


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
    PDL: tl.constexpr,
):
    """Row ``token`` of table [V, N], of a 16-bit type, into the residual stream x float32 [N] and normed planes."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.load(token_ptr)
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    e = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(table_ptr + token * N + e, mask=e < N, other=0.0).to(tl.float32)
    norm = norm_blocks(norm_ptr, block, N)
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.store(x_ptr + e, x, mask=e < N)
    store_normed(x, norm, block, q_ptr, s_ptr, squares_ptr, N, XC, C, FOLD, BB)


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
    PDL: tl.constexpr,
):
    """The residual stream x float32 [N] into normed planes."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    e = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    norm = norm_blocks(norm_ptr, block, N)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + e, mask=e < N, other=0.0)
    store_normed(x, norm, block, q_ptr, s_ptr, squares_ptr, N, XC, C, FOLD, BB)


@triton.jit
def plain(x_ptr, q_ptr, s_ptr, N, XC, C: tl.constexpr, FOLD: tl.constexpr, BB: tl.constexpr, PDL: tl.constexpr):
    """x float32 [N] into planes."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0) * BB + tl.arange(0, BB)
    e = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + e, mask=e < N, other=0.0)
    store_planes(x, block, q_ptr, s_ptr, (N + 31) // 32, XC, C, FOLD, BB)
