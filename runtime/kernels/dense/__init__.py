"""Y = X·Wᵀ + bias on BF16 weights: an exact matrix-vector kernel, and tensor cores for prompts.

Prompts keep 16 bits of the activations: x is split into a BF16 value and a BF16 remainder, both are multiplied by the
BF16 weights (which are exact) with float32 sums, and the two results are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton import cdiv

from lbq.runtime.kernels.dense import triton as kernels


def gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """float [M, K] · bfloat16 [N, K]ᵀ + float32 [N] in float32: ``out`` [M, N] of any float type, or a new float32."""
    (m, k), n = x.shape, weight.shape[0]
    assert weight.shape == (n, k)
    assert x.is_contiguous()
    assert weight.is_contiguous()
    if out is None:
        out = torch.empty((m, n), dtype=torch.float32, device=x.device)
    assert out.shape == (m, n)
    rows, warps = 4, 4
    kernels.gemv[(cdiv(n, rows) * m,)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        n,
        m,
        K=k,
        BN=rows,
        BK=256 * warps,
        HAS_BIAS=bias is not None,
        num_warps=warps,
    )
    return out


def float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] · b [N, K]ᵀ of 16-bit operands, summed and returned in float32."""
    if a.is_cuda:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.float() @ b.float().t()  # the interpreter's tensors: torch has no such product on a CPU


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [M, K] · bfloat16 [N, K]ᵀ + float32 [N]: float32 [M, N], activations kept to 16 bits."""
    high = x.bfloat16()
    low = (x - high.float()).bfloat16()
    both = torch.cat((high, low))
    y = float32_product(both, weight)
    y = y[: x.shape[0]] + y[x.shape[0] :]
    return y if bias is None else y.add_(bias)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices keep all their bits: TF32 is off meanwhile, whatever the process has chosen."""
    switch = torch.backends.cuda.matmul
    chosen = switch.fp32_precision
    switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = chosen


def exact_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As :func:`matmul`, with float32 products of unrounded activations, a bounded tile of rows at a time."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    rows = max(1, (64 << 20) // (4 * weight.shape[1]))
    with full_float32():
        for start in range(0, weight.shape[0], rows):
            y[:, start : start + rows] = x @ weight[start : start + rows].float().t()
    return y if bias is None else y.add_(bias)
