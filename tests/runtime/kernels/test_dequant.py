"""Opening tiles and multiplying them, against float64; see test_gemv.py for where this runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.formats.packing import BITS, PackedWeight
from lbq.runtime.kernels import dequant, gemv
from lbq.runtime.kernels.dequant import reference
from lbq.runtime.kernels.gemv.reference import gemv as float64_product
from lbq.runtime.kernels.gemv.triton import INTERPRETED

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(9, 192, 64), (5, 1009, 1009), (6, 4304, 4304), (7, 1536, 512)]
if not INTERPRETED:
    SHAPES += [(33, 576, 32), (1021, 4096, 256), (300, 14336, 128), (257, 4864, 4864)]

Weights = Callable[..., PackedWeight]
Error = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_float32_tiles_are_exact(bits: int, n: int, k: int, group: int, random_weight: Weights) -> None:
    weight = random_weight(n, k, bits, group, DEVICE)
    start, stop = n // 3, n
    out = dequant.dequantize(
        gemv.arrange(weight), start, stop, torch.empty((stop - start, k), dtype=torch.float32, device=DEVICE)
    )
    assert torch.equal(out, weight.dequantize()[start:stop])


@pytest.mark.parametrize("bits", BITS)
def test_float16_tiles_fit_the_range(bits: int, random_weight: Weights) -> None:
    """Scales far outside float16's range, and a row of zeros."""
    weight = random_weight(5, 192, bits, 64, DEVICE)
    weight.scales[0] *= 1e20
    weight.scales[1] *= 1e-20
    weight.scales[2] = 0
    arranged = gemv.arrange(weight)
    norms = dequant.row_norms(arranged)
    out = dequant.dequantize(arranged, 0, 5, torch.empty((5, 192), dtype=torch.float16, device=DEVICE), norms)
    assert float((out.double() - reference.dequantize(weight, norms)).abs().max()) <= 2.0**-11
    assert float(out.abs().max()) <= 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("exact", [False, True])
def test_products_against_float64(
    bits: int, n: int, k: int, group: int, exact: bool, random_weight: Weights, relative_error: Error
) -> None:
    weight = random_weight(n, k, bits, group, DEVICE)
    arranged = gemv.arrange(weight)
    x = torch.randn(33, k, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    x[1] *= 1e8  # beyond float16
    x[2] *= 1e-8
    x[3] = 0
    bias = torch.randn(n, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    scratch = 4 * k * max(1, n // 3)  # several tiles
    if exact:
        y = dequant.exact_matmul(x, arranged, bias, scratch)
    else:
        y = dequant.matmul(x, arranged, dequant.row_norms(arranged), bias, scratch // 2)
    y64 = float64_product(x, weight, bias)
    norms = y64.norm(dim=1, keepdim=True)  # every token counts alike
    assert relative_error(y / norms, y64 / norms) <= (1e-6 if exact else 5e-4)
