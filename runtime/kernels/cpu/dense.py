"""BF16 matrices through FBGEMM's fp16 GEMM: 16 bits a weight in memory, float32 activations, products and sums.

torch's BF16 matmul rounds activations and outputs to bfloat16 (2e-3 of the output). FBGEMM converts fp16 weights to
float32 in registers instead and reads them at memory speed. fp16 holds every bfloat16 value whose magnitude is
between 2⁻¹⁷ and 2¹⁶; the matrix is multiplied by a power of two that brings its largest value just below 2¹⁵, so
that a value is exact unless it is 2³² times smaller than the largest, and the activations are divided by it.
"""

from __future__ import annotations

import math

import torch

from lbq.runtime.kernels.cpu.fbgemm import half_linear, missing_fbgemm, pack_half
from lbq.runtime.kernels.cpu.mapped import by_tiles, check_bias, check_input
from lbq.runtime.kernels.linear import Choice, Matrix

BLOCK = 4 << 20  # weights packed at a time: FBGEMM takes them as float32
SHIFTS = (-110, 110)  # powers of two that leave activations within float32's range


class DenseLinear:
    """y = x · Wᵀ + bias for a bfloat16 ``weight`` [N, K] that stays 16-bit, and a float32 ``bias`` [N].

    FBGEMM's copy holds no reference to ``weight``. ``exact``, or a torch without FBGEMM, keeps it mapped and makes
    float32 tiles of it for every call; ``exact`` takes a float32 ``weight`` too.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, exact: bool = False) -> None:
        assert weight.dtype == torch.bfloat16 or (exact and weight.dtype == torch.float32)
        assert weight.dim() == 2
        self.n, self.k = weight.shape
        check_bias(bias, self.n)
        self._bias = bias
        self._mapped: torch.Tensor | None = None
        choice = self.choose(Matrix(self.n, self.k, 8 * weight.itemsize, self.k), exact=exact)
        self.kernel, self.fallback, self.resident_bytes = choice.kernel, choice.fallback, choice.resident_bytes
        if exact or self.fallback:
            self._mapped = weight
        else:
            self._pack(weight)

    @staticmethod
    def choose(matrix: Matrix, *, exact: bool) -> Choice:
        """What a linear of ``matrix`` will be; of 32 bits, one of float32 weights."""
        missing = None if exact else missing_fbgemm()
        if not (exact or missing):
            return Choice("FBGEMM fp16 weights, float32 sums (CPU)", None, 2 * matrix.n * matrix.k)
        if matrix.bits == 32:
            return Choice("float32 weights (CPU)", missing, 4 * matrix.n * matrix.k)
        return Choice("float32 tiles of the mapped BF16 file (CPU)", missing, 0)

    def _pack(self, weight: torch.Tensor) -> None:
        rows = max(1, BLOCK // self.k)
        blocks = weight.split(rows)
        largest = max(float(block.abs().amax()) for block in blocks)
        least, most = SHIFTS
        shift = min(max(15 - math.frexp(largest)[1], least), most)
        self._unscale = 2.0**-shift
        with torch.inference_mode(False):
            self._packed = [pack_half(torch.ldexp(block.float(), torch.tensor(shift)), None) for block in blocks]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        check_input(x, self.k)
        mapped = self._mapped
        if mapped is not None:
            return by_tiles(x, self.n, lambda a, b: mapped[a:b].float(), self._bias)
        x = x * self._unscale
        parts: list[torch.Tensor] = [half_linear(x, block) for block in self._packed]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if self._bias is None else y.add_(self._bias)
