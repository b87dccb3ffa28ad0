"""A quantised matrix as other tools store one: zero points, act-order, scales that lbq's own format does not hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lbq.formats.packing import BITS, GROUPS, SCALE_DTYPE, PackedWeight, pack, unpack

ASYMMETRIC = "asymmetric: zero points differ from the middle"
BLOCK = 1 << 21  # weights dequantised at a time: bounds the float32 temporaries


@dataclass(frozen=True)
class NoImage:
    """lbq's format has no exact image of a matrix, and why."""

    reason: str


@dataclass(frozen=True)
class Coded:
    """W[n, k] = scales[n, j] · (codes[n, k] − zeros[n, j]) where j is ``columns[k]``, by default k // group.

    ``codes`` are unsigned, uint8 [N, K]; ``scales`` and ``zeros`` are [N, G], the first finite floats of any width,
    the second int16, None standing for 2^(bits−1) everywhere. The last group may be shorter than the others. Where
    there are ``biases``, floats [N, G], there are no zero points: W[n, k] = scales[n, j] · codes[n, k] + biases[n, j].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group: int
    columns: torch.Tensor | None = None  # int64 [K], below G
    biases: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        assert self.codes.dtype == torch.uint8
        assert self.scales.shape == (n, -(-k // self.group))
        assert self.zeros is None or self.zeros.shape == self.scales.shape
        assert self.biases is None or (self.zeros is None and self.biases.shape == self.scales.shape)
        assert self.columns is None or self.columns.shape == (k,)

    def rows(self, start: int, stop: int) -> Coded:
        """Rows [start, stop), sharing memory."""
        part = slice(start, stop)
        zeros = None if self.zeros is None else self.zeros[part]
        biases = None if self.biases is None else self.biases[part]
        return Coded(self.codes[part], self.scales[part], zeros, self.bits, self.group, self.columns, biases)

    def dequantize(self) -> torch.Tensor:
        """The matrix, float32 [N, K]: exact for scales of up to 16 bits, but for the rounding of a sum with biases."""
        n, k = self.codes.shape
        out = torch.empty(n, k, dtype=torch.float32)
        columns = self._columns()
        rows = max(1, BLOCK // k)
        for at in range(0, n, rows):
            part = slice(at, at + rows)
            values = self.codes[part].to(torch.float32)
            scales = self.scales[part].to(torch.float32)[:, columns]
            if self.biases is not None:
                out[part] = values.mul_(scales).add_(self.biases[part].to(torch.float32)[:, columns])
            else:
                values -= 1 << (self.bits - 1) if self.zeros is None else self.zeros[part].to(torch.float32)[:, columns]
                out[part] = values.mul_(scales)
        return out

    def image(
        self, bits: int | None = None, group: int | None = None, *, round_scales: bool = False
    ) -> PackedWeight | NoImage:
        """The same matrix, weight by weight, in lbq's format; or why there is none.

        ``bits`` may be more than there are: codes of 4 bits with zero points are codes of 8 without. ``group``, by
        default the largest that there is, may be smaller: scales are repeated. With ``round_scales`` the image has
        the same codes and the nearest BF16 scales, off by at most 2⁻⁹ of each.
        """
        bits = self.bits if bits is None else bits
        k = self.codes.shape[1]
        group = stored_group(self.group, k) if group is None else group
        if bits not in BITS:
            return NoImage(f"{bits} bits")
        codes = self._centred(1 << (bits - 1))
        if codes is None or bool((codes < 0).any()) or bool((codes > (1 << bits) - 1).any()):
            asymmetric = self.zeros is not None or self.biases is not None
            return NoImage(ASYMMETRIC if asymmetric else f"{self.bits} bits")
        if group is None:
            return NoImage(f"groups of {self.group} in {k} inputs")
        if self.columns is None and self.group % group:
            return NoImage(f"groups of {self.group}")
        of_group = self._columns().view(-1, group)
        if not bool((of_group == of_group[:, :1]).all()):
            return NoImage("act-order: groups are not of neighbours")
        wanted = self.scales[:, of_group[:, 0]]
        scales = wanted.to(SCALE_DTYPE)
        if not round_scales and not torch.equal(scales.double(), wanted.double()):
            return NoImage(f"{_name(self.scales.dtype)} scales that BF16 does not hold")
        return PackedWeight(pack(codes.to(torch.uint8), bits), scales.contiguous(), bits, group, k)

    def _centred(self, middle: int) -> torch.Tensor | None:
        """Codes that stand for zero at ``middle``, [N, K]; None for biases, which no code stands for."""
        own = 1 << (self.bits - 1)
        if self.biases is not None:
            return None
        if self.zeros is None or bool((self.zeros == own).all()):
            return self.codes if middle == own else self.codes.to(torch.int16) + (middle - own)
        return self.codes.to(torch.int16) - self.zeros[:, self._columns()] + middle

    def _columns(self) -> torch.Tensor:
        return torch.arange(self.codes.shape[1]) // self.group if self.columns is None else self.columns


def stored_group(group: int, k: int) -> int | None:
    """The largest group of lbq's that ``k`` inputs in groups of ``group``, the last perhaps shorter, divide into."""
    if group == k:
        return k
    return max((g for g in GROUPS if group % g == 0 and k % g == 0), default=None)


def unpack_stream(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """:func:`lbq.formats.packing.unpack`, for 2 bits too: int32 [N, ⌈K·bits/32⌉] to uint8 [N, K]."""
    if bits != 2:
        return unpack(words, bits, k)
    stream = words.contiguous().view(torch.uint8)
    return torch.stack([(stream >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).view(words.shape[0], -1)[:, :k]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
