"""Linears on the CPU: a stored matrix becomes the fastest float32-accurate kernel that this build of torch has.

Which kernels were tried, what they cost and why these were kept is in ``docs/cpu-kernels.md``.
"""

from __future__ import annotations

import torch

from lbq.formats.packing import PackedWeight
from lbq.runtime.kernels.cpu.dense import DenseLinear
from lbq.runtime.kernels.cpu.fbgemm import missing_fbgemm
from lbq.runtime.kernels.cpu.int4 import NibbleBagLinear
from lbq.runtime.kernels.cpu.int8 import ByteBagLinear
from lbq.runtime.kernels.cpu.mapped import MappedLinear, check_bias
from lbq.runtime.kernels.linear import Choice, Linear, Matrix

__all__ = ["DenseLinear", "choose", "cpu_linear"]


def cpu_linear(weight: PackedWeight, bias: torch.Tensor | None = None, *, exact: bool = False) -> Linear:
    """y = x · Wᵀ + bias for a quantised ``weight`` and a float32 ``bias`` [N].

    ``exact`` asks for the reference mode: tiles of the mapped file become float32, then a float32 matmul. Otherwise
    the weight is rearranged for FBGEMM and the result holds no reference to ``weight``'s tensors. Both keep
    activations, products and sums in float32.
    """
    check_bias(bias, weight.n)
    missing = None if exact else missing_fbgemm()
    if exact or missing:
        return MappedLinear(weight, bias, missing)
    return _by_bags(weight.bits)(weight, bias)


def choose(matrix: Matrix, *, exact: bool = False) -> Choice:
    """What serves a matrix here: what :func:`cpu_linear`, or at 16 bits :class:`DenseLinear`, would be."""
    if matrix.bits == 16:
        return DenseLinear.choose(matrix, exact=exact)
    missing = None if exact else missing_fbgemm()
    if exact or missing:
        return Choice(MappedLinear.name(matrix.bits), missing, 0)
    kind = _by_bags(matrix.bits)
    return Choice(kind.name(matrix.bits), None, kind.bytes_of(matrix))


def _by_bags(bits: int) -> type[ByteBagLinear | NibbleBagLinear]:
    return ByteBagLinear if bits == 8 else NibbleBagLinear
