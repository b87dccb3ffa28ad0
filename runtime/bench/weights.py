"""Random weights on a device, such that activations keep their size from layer to layer."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lbq.formats.manifest import QuantizedModule
from lbq.formats.packing import PackedWeight, packed_words
from lbq.formats.scheme import effective_group
from lbq.formats.spec import ModelSpec, Projection
from lbq.runtime.kernels.linear import Linear


class RandomWeights:
    """:class:`lbq.runtime.binding.Weights` that are drawn when they are asked for: layers in ``bits``, head in INT8.

    A name gives the same numbers every time, so that two decoders can be bound to the same weights one after the other.
    """

    def __init__(self, spec: ModelSpec, bits: int, group: int | None, device: torch.device, seed: int = 1) -> None:
        """Groups are of ``group`` (None: a row), or what divides a row, as the quantizer has it; the head's rows."""
        self.spec = spec
        self._device, self._seed = device, seed
        self._random = torch.Generator(device)
        self._norms = dict(spec.norms())
        head = spec.head.name
        self.quantized: Mapping[str, QuantizedModule] = {
            p.name: _entry(p, 8, None) if p.name == head else _entry(p, bits, group) for p in spec.projections()
        }

    def is_quantized(self, module: str) -> bool:
        return module in self.quantized

    def packed(self, module: str) -> PackedWeight:
        entry = self.quantized[module]
        self._begin(module)
        return self.draw(entry.n, entry.k, entry.bits, entry.group)

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
        self._begin(module)
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        return torch.randn(shape, device=self._device, generator=self._random).bfloat16()

    def release(self, module: str) -> None:
        """Nothing to do: what was drawn belongs to whoever asked."""

    def release_dense(self, name: str) -> None:
        """Nothing to do."""

    def _begin(self, name: str) -> None:
        self._random.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))


def _entry(p: Projection, bits: int, group: int | None) -> QuantizedModule:
    return QuantizedModule(p.out_features, p.in_features, bits, effective_group(p.in_features, group) or p.in_features)


@dataclass(frozen=True)
class DeviceKernels:
    """A CUDA device's kernels on ``device``, which under Triton's interpreter may be the CPU."""

    device: torch.device
    exact: bool = False

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cuda import CudaLinear

        return CudaLinear(weight.to(self.device), bias, exact=self.exact)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        from lbq.runtime.kernels.cuda import DenseCudaLinear

        return DenseCudaLinear(weight.to(self.device), bias, exact=self.exact)
