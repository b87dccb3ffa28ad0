"""Round to nearest: a floating-point matrix to integer codes and one BF16 scale for every group of inputs.

Codes are computed against the scale as it is stored, after its rounding to BF16, so that what a reader dequantises is
what was minimised here. With b bits a code q lies in [−2^(b−1), 2^(b−1) − 1] and stands for q · scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import torch

from lbq.formats.errors import DataError
from lbq.formats.packing import BITS, SCALE_DTYPE, PackedWeight, pack

SMALLEST_SCALE = torch.finfo(SCALE_DTYPE).tiny  # the smallest normal number: subnormals may be flushed by a reader
LARGEST_WEIGHT = torch.finfo(SCALE_DTYPE).max


class ScaleRule(StrEnum):
    """How a group's scale follows from its weights.

    ABSMAX: max|w| / (2^(b−1) − 1). No code is clamped; the code −2^(b−1) is never used.
    SIGNED: −e / 2^(b−1) with e the element of largest magnitude, so that e takes the code −2^(b−1) and the scale has
    the sign opposite to e's. All codes are used and the step is finer, but an element of the other sign may be
    clamped, and then be off by up to one step. (llama.cpp's Q4_0 has the same rule.)
    ABSMAX_MSE, SIGNED_MSE: the scale, among those of the rule times SHRINK, with the least sum of squared errors.
    SIGNED_L4: the same with fourth powers, which spares the large weights that a squared error would clamp.
    """

    ABSMAX = "absmax"
    SIGNED = "signed"
    ABSMAX_MSE = "absmax-mse"
    SIGNED_MSE = "signed-mse"
    SIGNED_L4 = "signed-l4"


# Of the errors that a search adds up; powers of two.
SEARCH_POWERS: Mapping[ScaleRule, int] = {ScaleRule.ABSMAX_MSE: 2, ScaleRule.SIGNED_MSE: 2, ScaleRule.SIGNED_L4: 4}
SHRINK = tuple(1 - step / 50 for step in range(16))  # 1.00, 0.98, … 0.70

# The lowest KL divergence over the models measured: docs/scale-rules.md.
DEFAULT_RULES: Mapping[int, ScaleRule] = {3: ScaleRule.SIGNED_L4, 4: ScaleRule.SIGNED, 8: ScaleRule.SIGNED}


class UnquantizableWeightError(DataError):
    """An element that has no code: NaN, infinite, or beyond what BF16 holds.

    ``index`` is its flat, row-major index in the matrix that was given. Who knows the tensor's name, its file and the
    rows before this block raises a DataError that says them.
    """

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"element {index} is {value}, which cannot be quantised")
        self.index = index
        self.value = value


def quantize(weight: torch.Tensor, bits: int, group: int | None = None, rule: ScaleRule | None = None) -> PackedWeight:
    """Quantise ``weight`` [N, K], of any floating dtype, on its own device; ``weight`` is left as it is.

    ``group`` inputs share a scale and divide K; None is one scale a row. ``rule`` None is ``DEFAULT_RULES[bits]``.
    Rows do not depend on one another: blocks of rows give the same codes as the whole.

    Every scale is finite and at least ``SMALLEST_SCALE`` in magnitude; a group of zeros has the scale 1 and stays
    zero. Every element is off by at most half a step (|scale|) unless its code is clamped, which the rules above say.

    UnquantizableWeightError if an element is NaN, infinite or beyond BF16's range.
    """
    assert weight.dim() == 2
    assert weight.is_floating_point()
    assert bits in BITS
    n, k = weight.shape
    group = k if group is None else group
    assert k % group == 0
    rule = DEFAULT_RULES[bits] if rule is None else rule
    grouped = weight.to(torch.float32).reshape(n, k // group, group)
    scales = _scales(grouped, bits, rule)
    codes = _round(grouped, scales.unsqueeze(2).to(torch.float32), bits).add_(1 << (bits - 1)).to(torch.uint8)
    return PackedWeight(pack(codes.view(n, k), bits), scales, bits, group, k)


def _scales(grouped: torch.Tensor, bits: int, rule: ScaleRule) -> torch.Tensor:
    """BF16 scales [N, G] for float32 weights [N, G, group]."""
    extreme = _extremes(grouped)
    if rule in (ScaleRule.ABSMAX, ScaleRule.ABSMAX_MSE):
        wanted = extreme.abs() / ((1 << (bits - 1)) - 1)
    else:
        wanted = extreme / -(1 << (bits - 1))
    wanted = torch.where(extreme == 0, 1.0, wanted)
    if rule in SEARCH_POWERS:
        return _least_error(grouped, wanted, bits, SEARCH_POWERS[rule])
    return _stored(wanted)


def _extremes(grouped: torch.Tensor) -> torch.Tensor:
    """The element of largest magnitude of every group, float32 [N, G]; the negative one of two equals."""
    low, high = grouped.amin(2), grouped.amax(2)  # NaN goes through both
    extreme = torch.where(-low >= high, low, high)
    if not bool((extreme.abs() <= LARGEST_WEIGHT).all()):
        flat = grouped.flatten()
        index = int((~(flat.abs() <= LARGEST_WEIGHT)).to(torch.uint8).argmax())
        raise UnquantizableWeightError(index, float(flat[index]))
    return extreme


def _stored(wanted: torch.Tensor) -> torch.Tensor:
    """The BF16 scale nearest to ``wanted`` that does not vanish; the sign is kept."""
    scales = wanted.to(SCALE_DTYPE)
    smallest = torch.full_like(scales, SMALLEST_SCALE)
    return torch.where(scales.abs() < smallest, smallest.copysign(scales), scales)


def _least_error(grouped: torch.Tensor, wanted: torch.Tensor, bits: int, power: int) -> torch.Tensor:
    """Of the scales ``wanted`` · SHRINK, the one of least Σ error^power in each group; the largest of equals."""
    start = _stored(wanted)
    unit = start.unsqueeze(2).to(torch.float32)
    relative = grouped / unit  # in steps of the first scale: powers cannot overflow
    best, least = start, torch.full_like(wanted, torch.inf)
    for factor in SHRINK:
        scales = _stored(wanted * factor)
        ratio = scales.unsqueeze(2).to(torch.float32) / unit
        powers = _round(relative, ratio, bits).mul_(ratio).sub_(relative)
        for _ in range(power.bit_length() - 1):
            powers.square_()  # an eighth of pow's time
        error = powers.sum(2)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def _round(values: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes, as float32."""
    half = 1 << (bits - 1)
    return (values / scales).round_().clamp_(-half, half - 1)
