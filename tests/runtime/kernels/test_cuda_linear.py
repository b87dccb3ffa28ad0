"""Linear layers on a CUDA device; see test_gemv.py for where this runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.formats.packing import BITS, PackedWeight
from lbq.runtime.kernels.cuda import CudaLinear, DenseCudaLinear
from lbq.runtime.kernels.gemv.reference import gemv as float64_product
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.linear import Linear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if INTERPRETED else "cuda"
Weights = Callable[..., PackedWeight]
Error = Callable[[torch.Tensor, torch.Tensor], float]


def _layers(bits: int, random_weight: Weights, exact: bool = False) -> tuple[Linear, PackedWeight, torch.Tensor]:
    weight = random_weight(13, 576, bits, 64, DEVICE)
    bias = torch.randn(13, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return CudaLinear(weight, bias, exact=exact), weight, bias


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 2, 17])
@pytest.mark.parametrize("exact", [False, True])
def test_packed(bits: int, m: int, exact: bool, random_weight: Weights, relative_error: Error) -> None:
    layer, weight, bias = _layers(bits, random_weight, exact)
    x = torch.randn(m, 576, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    y = layer(x)
    assert y.dtype == torch.float32
    bound = 1e-6 if exact else 2e-4 if m <= 16 else 5e-4
    assert relative_error(y, float64_product(x, weight, bias)) <= bound
    assert (layer.n, layer.k, layer.fallback) == (13, 576, None)
    assert f"INT{bits}" in layer.kernel
    assert weight.nbytes < layer.resident_bytes <= weight.nbytes + 13 * 8


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, 64)])
def test_a_few_tokens_by_tensor_cores(bits: int, group: int, random_weight: Weights, relative_error: Error) -> None:
    weight = random_weight(13, 256, bits, group, DEVICE)
    layer = CudaLinear(weight)
    for m in (2, 19) if INTERPRETED else (2, 16, 17, 96):
        x = torch.randn(m, 256, generator=torch.Generator().manual_seed(m)).to(DEVICE)
        y = layer(x)
        assert y.shape == (m, 13)
        assert relative_error(y, float64_product(x, weight)) <= 1e-4


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("exact", [False, True])
def test_dense(m: int, exact: bool, relative_error: Error) -> None:
    weight = torch.randn(33, 576, generator=torch.Generator().manual_seed(7)).bfloat16().to(DEVICE)
    x = torch.randn(m, 576, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    layer: Linear = DenseCudaLinear(weight, exact=exact)
    assert relative_error(layer(x), x.double() @ weight.double().t()) <= (1e-6 if exact else 2e-5)
    assert (layer.n, layer.k, layer.fallback, layer.resident_bytes) == (33, 576, None, 33 * 576 * 2)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 40])
def test_in_a_cuda_graph(bits: int, m: int, random_weight: Weights) -> None:
    layer, _, _ = _layers(bits, random_weight)
    dense = DenseCudaLinear(torch.randn(20, 13).bfloat16().to(DEVICE))
    x = torch.randn(m, 576, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        dense(layer(x))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dense(layer(x))
    for _ in range(3):
        x.normal_()
        expected = dense(layer(x))
        y.fill_(float("nan"))
        graph.replay()
        # torch's matmul may choose another kernel in a graph; ours may not
        tolerance = 0.0 if m == 1 else 1e-5
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
