"""Linear layers on a CUDA device; see ``linear.Linear`` for what they share with the CPU's.

Calls are safe to capture in a CUDA graph: no host synchronisation, and memory only from torch's allocator.
"""

from __future__ import annotations

from functools import cached_property

import torch

from lbq.formats.packing import PackedWeight, packed_words
from lbq.runtime.kernels import batch, dense, dequant, gemv
from lbq.runtime.kernels.linear import Choice, Matrix

GEMV_TOKENS = 16  # up to this many tokens the matrix-vector kernel is used, one pass over the weights' L2 lines each
# Up to this many a pass of tensor cores for each 16 is used instead, where that kernel serves the weights: on an H200
# 36 µs a pass of 28672×4096 in INT4, against 320 µs for making float16 of them at any number of tokens.
BATCH_TOKENS = 96


def choose(matrix: Matrix, *, exact: bool = False) -> Choice:
    """What serves a matrix on a CUDA device: what a :class:`CudaLinear`, or at 16 bits a :class:`DenseCudaLinear`,
    would be."""
    n, k = matrix.n, matrix.k
    if matrix.bits == 16:
        nbytes = 2 * n * k
    else:
        words = 3 * -(-k // 32) if matrix.bits == 3 else packed_words(k, matrix.bits)  # see gemv.arrange
        nbytes = 4 * n * words + 2 * n * (k // matrix.group) + 2 * n  # the last are the rows' norms
    return Choice(_name(matrix.bits, exact=exact), None, nbytes + (4 * n if matrix.bias else 0))


def _name(bits: int, *, exact: bool) -> str:
    """What ``kernel`` says."""
    if bits == 16:
        return "float32 matmul" if exact else "Triton BF16 GEMV, prompts by BF16 matmul"
    how = "GEMV (activations in two int8 planes), prompts by dequantise + float16 matmul"
    return f"Triton INT{bits} " + ("dequantise + float32 matmul" if exact else how)


def _checked_bias(bias: torch.Tensor | None, n: int, device: torch.device) -> torch.Tensor | None:
    if bias is None:
        return None
    assert bias.shape == (n,)
    # Not waited for: that would be for all weights on their way.
    return bias.float().contiguous().to(device, non_blocking=True)


class CudaLinear:
    """y = x · Wᵀ + bias on packed weights: float32 [M, K] → float32 [M, N].

    ``weight`` is on the CUDA device (its words are used in place at 8 and 4 bits, rearranged once at 3); ``bias`` is
    [N]. One token, and a few, run on two int8 planes of the activations, as matrix-vector products or by int8 tensor
    cores; more through float16 tiles. ``exact`` multiplies in float32 instead, TF32 off: slower, for evaluations and
    for checking.
    """

    fallback: str | None = None

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None = None, *, exact: bool = False) -> None:
        self.weight = gemv.arrange(weight)
        self.bias = _checked_bias(bias, weight.n, weight.words.device)
        self._batched = batch.why_not(self.weight) is None
        self.exact = exact
        self.n, self.k = weight.n, weight.k
        self.resident_bytes = self.weight.nbytes + 2 * self.n  # the latter are norms
        self.resident_bytes += 0 if self.bias is None else self.bias.nbytes
        self.kernel = _name(weight.bits, exact=exact)

    @cached_property
    def norms(self) -> torch.Tensor:
        """``dequant.row_norms``, made for the first prompt that is long: a dozen small launches for every matrix."""
        return dequant.row_norms(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 2
        assert x.shape[1] == self.k
        x = x.contiguous()
        if self.exact:
            return dequant.exact_matmul(x, self.weight, self.bias)
        if self._batched and 1 < x.shape[0] <= BATCH_TOKENS:
            parts = [batch.planes(part, self.weight.bits) for part in x.split(batch.TOKENS)]
            return torch.cat([batch.batch(part, self.weight, self.bias) for part in parts])
        if x.shape[0] > GEMV_TOKENS:
            return dequant.matmul(x, self.weight, self.norms, self.bias)
        return gemv.gemv(gemv.quantize(x, self.weight.bits), self.weight, self.bias)


class DenseCudaLinear:
    """y = x · Wᵀ + bias on BF16 weights [N, K]: float32 [M, K] → float32 [M, N].

    Up to 16 tokens in float32, more on tensor cores with 16-bit activations; ``exact`` as for :class:`CudaLinear`, and
    it takes float32 weights too.
    """

    fallback: str | None = None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, exact: bool = False) -> None:
        assert weight.dim() == 2
        assert weight.dtype == torch.bfloat16 or (exact and weight.dtype == torch.float32)
        self.weight = weight.contiguous()
        self.bias = _checked_bias(bias, weight.shape[0], weight.device)
        self.exact = exact
        self.n, self.k = weight.shape
        self.resident_bytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        self.kernel = _name(16, exact=exact)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 2
        assert x.shape[1] == self.k
        x = x.contiguous()
        if self.exact:
            return dense.exact_matmul(x, self.weight, self.bias)
        if x.shape[0] > GEMV_TOKENS:
            return dense.matmul(x.float(), self.weight, self.bias)
        return dense.gemv(x, self.weight, self.bias)
