"""Weights that stay in the mapped file: a tile of rows becomes float32, then a float32 matmul, for every call.

This is the reference mode, and what serves a CPU whose torch has no FBGEMM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lbq.formats.packing import PackedWeight

TILE = 1 << 19  # weights dequantised at a time: 2 MiB of float32


class MappedLinear:
    """A quantised matrix, dequantised exactly."""

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None, fallback: str | None) -> None:
        self.kernel = self.name(weight.bits)
        self.fallback = fallback
        self.n, self.k, self.resident_bytes = weight.n, weight.k, 0
        self._weight, self._bias = weight, bias

    @staticmethod
    def name(bits: int) -> str:
        """What ``kernel`` says."""
        return f"float32 tiles of the mapped INT{bits} file (CPU)"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        check_input(x, self.k)
        return by_tiles(x, self.n, lambda a, b: self._weight.rows(a, b).dequantize(), self._bias)


def by_tiles(
    x: torch.Tensor, n: int, tile: Callable[[int, int], torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """x · Wᵀ + bias, where ``tile(a, b)`` makes rows [a, b) of W, float32."""
    m, k = x.shape
    y = x.new_empty(m, n)
    rows = max(1, TILE // k)
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        y[:, start:stop] = x @ tile(start, stop).t()
    return y if bias is None else y.add_(bias)


def check_input(x: torch.Tensor, k: int) -> None:
    """Activations are float32 [M, K], their rows without gaps."""
    assert x.dtype == torch.float32
    assert x.dim() == 2
    assert x.shape[1] == k
    assert x.stride(1) == 1


def check_bias(bias: torch.Tensor | None, n: int) -> None:
    """A bias is float32 [N]."""
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == (n,))
