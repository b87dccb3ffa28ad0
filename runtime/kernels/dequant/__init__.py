"""Y = X·Wᵀ for prompts: a bounded tile of W's rows is opened into a scratch, torch multiplies, and so on down W.

Default: float16 on tensor cores with float32 sums and results. Weights are scaled to [−1, 1] a row and activations to
[−2^14, 2^14] a token before they are rounded, so that float16's range never matters and its 11 bits are what is lost:
about 2.3e-4 of ‖y‖. (BF16 has 8 bits; TF32 has as many bits as float16 at half its rate, and is a global switch.) KL of
SmolLM2-135M's logits to float32 on the same weights, emulated on a CPU over 320 tokens: 4e-6 at INT8, 1.4e-5 at INT4
g64, 1.8e-5 at INT3 g64 on average.

Exact: weights in float32, which holds them exactly, and float32 products and sums; independent of torch's TF32 switch.
"""

from __future__ import annotations

import torch
from triton import cdiv, next_power_of_2

from lbq.runtime.kernels.dense import float32_product, full_float32
from lbq.runtime.kernels.dequant import triton as kernels
from lbq.runtime.kernels.gemv import ArrangedWeight
from lbq.runtime.kernels.gemv.tiles import codes_a_column

SCRATCH_BYTES = 64 << 20
ACTIVATION_PEAK = 2.0**14


def row_norms(weight: ArrangedWeight) -> torch.Tensor:
    """A power of two for each row, no less than any magnitude that its codes and scales can stand for; 0 for a row of
    zeros. bfloat16 [N], which holds it exactly: whoever multiplies it back reads two bytes an output, and dividing by
    it rounds nothing.
    """
    largest = torch.linalg.vector_norm(weight.scales, torch.inf, dim=1, dtype=torch.float32)
    exponents = torch.frexp(largest).exponent + weight.bits - 1
    return torch.where(largest > 0, torch.exp2(exponents.float()), 0.0).bfloat16()


def dequantize(
    weight: ArrangedWeight, start: int, stop: int, out: torch.Tensor, norms: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows [start, stop) of W, over their ``norms`` bfloat16 [N] if given, into ``out`` [stop − start, K]."""
    rows = stop - start
    assert out.shape == (rows, weight.k)
    assert out.is_contiguous()
    assert out.numel() < 2**31  # offsets in the kernel are 32 bits wide
    codes = codes_a_column(weight.bits)
    words = -(-weight.k // codes)
    block_n, block_w = 4, min(4096 // codes, next_power_of_2(words))
    scales = weight.scales[start:stop]
    kernels.dequantize[(cdiv(rows, block_n), cdiv(words, block_w))](
        weight.words[start:stop],
        scales,
        scales if norms is None else norms[start:stop],
        out,
        rows,
        weight.k,
        words,
        scales.shape[1],
        G=0 if scales.shape[1] == 1 else weight.group,
        BITS=weight.bits,
        RELATIVE=norms is not None,
        BN=block_n,
        BW=block_w,
        num_warps=4,
    )
    return out


def tiles(n: int, row_bytes: int, scratch_bytes: int) -> list[tuple[int, int]]:
    """[start, stop) of tiles of rows that fit the scratch; multiples of 128 rows where that many fit."""
    rows = max(1, scratch_bytes // row_bytes)
    rows = rows // 128 * 128 or rows
    return [(a, min(a + rows, n)) for a in range(0, n, rows)]


def matmul(
    x: torch.Tensor,
    weight: ArrangedWeight,
    norms: torch.Tensor,
    bias: torch.Tensor | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> torch.Tensor:
    """x [M, K] · Wᵀ + bias through float16 tiles: float32 [M, N]. ``norms`` as :func:`row_norms` gives them."""
    x = x.float()
    peak = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    x16 = (x * (ACTIVATION_PEAK / peak)).half()
    unit = peak / ACTIVATION_PEAK
    y = torch.empty((x.shape[0], weight.n), dtype=torch.float32, device=x.device)
    parts = tiles(weight.n, 2 * weight.k, scratch_bytes)
    scratch = torch.empty((parts[0][1], weight.k), dtype=torch.float16, device=x.device)
    for start, stop in parts:
        w16 = dequantize(weight, start, stop, scratch[: stop - start], norms)
        torch.mul(float32_product(x16, w16).mul_(unit), norms[start:stop], out=y[:, start:stop])
    return y if bias is None else y.add_(bias)


def exact_matmul(
    x: torch.Tensor, weight: ArrangedWeight, bias: torch.Tensor | None = None, scratch_bytes: int = SCRATCH_BYTES
) -> torch.Tensor:
    """x [M, K] · Wᵀ + bias with float32 products and sums: float32 [M, N]."""
    y = torch.empty((x.shape[0], weight.n), dtype=torch.float32, device=x.device)
    parts = tiles(weight.n, 4 * weight.k, scratch_bytes)
    scratch = torch.empty((parts[0][1], weight.k), dtype=torch.float32, device=x.device)
    with full_float32():
        for start, stop in parts:
            y[:, start:stop] = x @ dequantize(weight, start, stop, scratch[: stop - start]).t()
    return y if bias is None else y.add_(bias)
