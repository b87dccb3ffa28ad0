"""What a device brings: its kernels, its engine, the dtype of its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lbq.formats.errors import DeviceError
from lbq.formats.packing import PackedWeight
from lbq.formats.spec import ModelSpec
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine import EagerEngine
from lbq.runtime.kernels.linear import Linear

CUDA_CONTEXT = 8192  # the default there: a cache that cannot grow should not take a GPU's memory unasked


@dataclass(frozen=True)
class CpuDevice:
    """Weights stay mapped where the kernels can use them in place; the cache is float32 and grows with the text."""

    exact: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cpu import cpu_linear

        return cpu_linear(weight, bias, exact=self.exact)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cpu import DenseLinear

        return DenseLinear(weight, bias, exact=self.exact)

    def default_context(self, spec: ModelSpec) -> int:
        return spec.context

    def engine(self, decoder: Decoder, context: int) -> EagerEngine:
        return EagerEngine(decoder, context)


@dataclass(frozen=True)
class CudaDevice:
    """Weights are moved once; the cache is float16 (float32 when ``exact``) and allocated at once.

    What rounding keys and values costs, as KL divergence to float32: float16 4e-7 on SmolLM2-135M and 1e-6 on
    Qwen2.5-Coder-0.5B; bfloat16 3e-5 and 8e-4. The largest key there, biases of Qwen2 included, was 215; float16 goes
    to 65504, and past it the logits are not finite, which ends the text with an error.
    """

    exact: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cuda import CudaLinear

        words, scales = weight.words.to(self.device), weight.scales.to(self.device)
        there = PackedWeight(words, scales, weight.bits, weight.group, weight.k)
        return CudaLinear(there, bias, exact=self.exact)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cuda import DenseCudaLinear

        return DenseCudaLinear(weight.to(self.device), bias, exact=self.exact)

    def default_context(self, spec: ModelSpec) -> int:
        return min(spec.context, CUDA_CONTEXT)

    def engine(self, decoder: Decoder, context: int) -> EagerEngine:
        from lbq.runtime.engine_cuda import CudaEngine

        return CudaEngine(decoder, context, cache_dtype=torch.float32 if self.exact else torch.float16)


Device = CpuDevice | CudaDevice


def find_device(name: Literal["auto", "cpu", "cuda"], *, exact: bool) -> Device:
    """``auto`` is a GPU where torch sees one. Raises DeviceError for ``cuda`` where it sees none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CpuDevice(exact)
    if not torch.cuda.is_available():
        raise DeviceError(f"device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    return CudaDevice(exact)
