"""What is said before there are weights is what binding then finds."""

from __future__ import annotations

import pytest
import torch

from lbq.formats.manifest import QuantizedModule
from lbq.quantizer.rtn import quantize
from lbq.runtime.binding import bind
from lbq.runtime.devices import CUDA_CONTEXT, CUDA_SPARE, CpuDevice, CudaDevice
from lbq.runtime.kernels.cpu import DenseLinear, choose, cpu_linear
from lbq.runtime.kernels.linear import Choice, Linear, Matrix
from lbq.runtime.needs import needs


def make_weight(n, k, bits, group):
    return quantize(torch.randn(n, k), bits, group)


def said(linear: Linear) -> Choice:
    return Choice(linear.kernel, linear.fallback, linear.resident_bytes)


def entries(weights):
    """The manifest's entries of tiny weights."""
    return {name: QuantizedModule(w.n, w.k, w.bits, w.group) for name, w in weights.quantized.items()}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 1), (37, 96, 32), (1100, 192, 64), (3000, 576, 576), (5, 33, 33)])
def test_a_cpu_kernel(n, k, group, bits, threads):
    weight = make_weight(n, k, bits, group)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for exact in (False, True):
            assert choose(Matrix(n, k, bits, group), exact=exact) == said(cpu_linear(weight, exact=exact))
    finally:
        torch.set_num_threads(before)


def test_a_cpu_kernel_for_bf16():
    for exact in (False, True):
        linear = DenseLinear(torch.zeros(5, 33, dtype=torch.bfloat16), exact=exact)
        assert choose(Matrix(5, 33, 16, 33), exact=exact) == said(linear)


def test_a_cpu_without_fbgemm(monkeypatch):
    for module in ("dense", "__init__"):
        name = "lbq.runtime.kernels.cpu" + ("" if module == "__init__" else f".{module}")
        monkeypatch.setattr(f"{name}.missing_fbgemm", lambda: "it is Monday")
    assert choose(Matrix(5, 32, 4, 32)) == said(cpu_linear(make_weight(5, 32, 4, 32)))
    assert choose(Matrix(5, 32, 16, 32)) == said(DenseLinear(torch.zeros(5, 32, dtype=torch.bfloat16)))
    assert choose(Matrix(5, 32, 4, 32)).fallback == "it is Monday"


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", ["llama-tied", "llama-linear-biased", "qwen2-some-windows"])
def test_a_model_on_the_cpu(make_tiny, family, exact):
    tiny = make_tiny(family)
    weight = tiny.weights.quantized.pop("model.layers.1.mlp.down_proj")
    tiny.weights.tensors["model.layers.1.mlp.down_proj.weight"] = weight.dequantize().to(torch.bfloat16)
    device = CpuDevice(exact)
    bound = bind(tiny.weights, device)
    found = needs(tiny.weights.spec, entries(tiny.weights), device, context=40)
    assert found.units == bound.kernels
    assert found.weights == bound.resident_bytes
    assert found.cache == bound.decoder.new_state(40, dtype=device.cache_dtype(40), fixed=True).nbytes
    assert found.nbytes == found.weights + found.cache
    eight = needs(tiny.weights.spec, entries(tiny.weights), CpuDevice(exact=False, kv_cache="int8"), context=40)
    assert eight.cache == bound.decoder.new_state(40, dtype=torch.int8, fixed=True).nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
def test_a_model_on_a_gpu(tiny, exact):
    device = CudaDevice(exact)
    bound = bind(tiny.weights, device)
    found = needs(tiny.weights.spec, entries(tiny.weights), device, context=40)
    assert found.units == bound.kernels
    assert found.weights == bound.resident_bytes
    assert found.cache == bound.decoder.new_state(40, dtype=device.cache_dtype(40), fixed=True).nbytes


def test_a_gpu_that_is_not_there(tiny):
    found = needs(tiny.weights.spec, entries(tiny.weights), CudaDevice(exact=False))
    assert all(use.kernel.startswith("Triton") for use in found.units)
    assert found.context == min(tiny.weights.spec.context, CUDA_CONTEXT)
    assert found.spare == CUDA_SPARE
    assert found.nbytes > found.weights + found.cache > 0
