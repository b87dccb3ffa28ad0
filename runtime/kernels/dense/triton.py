# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel of the matrix-vector product on weights that stayed in 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "M"])  # a kernel compiles once for 1 to 16 tokens
def gemv(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    N,
    M,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y[m, n] = Σₖ w[n, k] · x[m, k] + bias[n] in float32; w [N, K], x [M, K] and y [M, N] of any float type."""
    m = tl.program_id(0) % M
    rows = (tl.program_id(0) // M) * BN + tl.arange(0, BN)
    safe = tl.minimum(rows, N - 1)
    w_row = w_ptr + safe[None, :].to(tl.int64) * K
    x_ptr += m * K
    acc = tl.zeros([BK, BN], dtype=tl.float32)
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        w = tl.load(w_row + k[:, None], mask=(k < K)[:, None], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[:, None]
    y = tl.sum(acc, axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + safe)
    tl.store(y_ptr + m * N + rows, y.to(y_ptr.dtype.element_ty), mask=rows < N)
