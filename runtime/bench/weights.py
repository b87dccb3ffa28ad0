"""Random weights on a device, such that activations keep their size from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lbq.formats.packing import PackedWeight, packed_words
from lbq.formats.spec import ModelSpec
from lbq.runtime.kernels.cuda import CudaLinear, DenseCudaLinear
from lbq.runtime.kernels.linear import Linear


class RandomWeights:
    """:class:`lbq.runtime.binding.Weights` that are drawn when they are asked for: layers in ``bits``, head in INT8."""

    def __init__(self, spec: ModelSpec, bits: int, group: int, device: torch.device, seed: int = 1) -> None:
        """Groups are of ``group``, or of a whole row where that is shorter or the width is 8."""
        self.spec = spec
        self._bits, self._group, self._device = bits, group, device
        self._random = torch.Generator(device).manual_seed(seed)
        self._projections = {p.name: p for p in spec.projections()}
        self._norms = dict(spec.norms())

    def is_quantized(self, module: str) -> bool:
        return module in self._projections

    def packed(self, module: str) -> PackedWeight:
        p = self._projections[module]
        bits = 8 if module == self.spec.head.name else self._bits
        group = p.in_features if bits == 8 or p.in_features % self._group else self._group
        return self.draw(p.out_features, p.in_features, bits, group)

    def draw(self, n: int, k: int, bits: int, group: int) -> PackedWeight:
        """A matrix [n, k] whose product with a normal vector is about as large as that."""
        shape = (n, packed_words(k, bits))
        words = torch.randint(
            -(2**31), 2**31 - 1, shape, dtype=torch.int32, device=self._device, generator=self._random
        )
        codes = 2.0**bits / 12**0.5  # the standard deviation of uniform codes
        unit = torch.randn(n, k // group, device=self._device, generator=self._random)
        return PackedWeight(words, ((1 + 0.2 * unit) / (codes * k**0.5)).bfloat16(), bits, group, k)

    def dense(self, name: str) -> torch.Tensor:
        """The embedding, or a norm's weights."""
        module = name.removesuffix(".weight")
        if module in self._norms:
            return torch.ones(self._norms[module], dtype=torch.bfloat16, device=self._device)
        assert module == self.spec.embedding
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        return torch.randn(shape, device=self._device, generator=self._random).bfloat16()

    def release(self, module: str) -> None:
        """Nothing to do: what was drawn belongs to whoever asked."""

    def release_dense(self, name: str) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class DeviceKernels:
    """A CUDA device's kernels on ``device``, which under Triton's interpreter may be the CPU."""

    device: torch.device
    exact: bool = False

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        return CudaLinear(weight, bias, exact=self.exact)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return DenseCudaLinear(weight, bias, exact=self.exact)
