"""Integer codes in 32-bit words, the way compressed-tensors (``pack-quantized``) and GPTQ store them.

A row of K unsigned codes is one little-endian bit stream: code i occupies bits [i·b, i·b + b). The stream is padded
with zero bits to whole int32 words. An unsigned code u stands for the signed value u − 2^(b−1). At 3 bits codes
cross word borders (compressed-tensors ≥ 0.18; older versions padded to ten codes a word).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BITS = (3, 4, 8)
GROUPS = (32, 64, 128, 256, 512)
SCALE_DTYPE = torch.bfloat16


def packed_words(k: int, bits: int) -> int:
    """Words that a row of ``k`` codes takes."""
    return -(-k * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes, uint8 [N, K], into int32 [N, ⌈K·bits/32⌉]."""
    assert codes.dtype == torch.uint8
    assert codes.dim() == 2
    assert bits in BITS
    n, k = codes.shape
    per_run = 32  # codes in the shortest run that ends on a word border at every width
    padded = -(-k // per_run) * per_run
    if padded != k:
        codes = torch.nn.functional.pad(codes, (0, padded - k))
    if bits == 8:
        stream = codes
    elif bits == 4:
        stream = codes[:, 0::2] | (codes[:, 1::2] << 4)
    else:  # eight 3-bit codes fill three bytes
        c = codes.view(n, padded // 8, 8)
        c0, c1, c2, c3, c4, c5, c6, c7 = c.unbind(2)
        b0 = c0 | (c1 << 3) | (c2 << 6)
        b1 = (c2 >> 2) | (c3 << 1) | (c4 << 4) | (c5 << 7)
        b2 = (c5 >> 1) | (c6 << 2) | (c7 << 5)
        stream = torch.stack((b0, b1, b2), dim=2).view(n, -1)
    words = stream.contiguous().view(torch.int32)
    return words[:, : packed_words(k, bits)].contiguous()


def unpack(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Unpack int32 [N, ⌈K·bits/32⌉] into unsigned codes, uint8 [N, K]: the inverse of :func:`pack`."""
    assert words.dtype == torch.int32
    assert words.dim() == 2
    assert words.shape[1] == packed_words(k, bits)
    stream = words.contiguous().view(torch.uint8)  # [N, 4·words]
    if bits == 8:
        return stream[:, :k].clone(memory_format=torch.contiguous_format)  # never a view: callers work in place
    if bits == 4:
        return torch.stack((stream & 15, stream >> 4), dim=2).view(words.shape[0], -1)[:, :k].contiguous()
    spare = -stream.shape[1] % 3
    if spare:
        stream = torch.nn.functional.pad(stream, (0, spare))
    b0, b1, b2 = stream.view(stream.shape[0], -1, 3).unbind(2)
    codes = (
        b0 & 7,
        (b0 >> 3) & 7,
        (b0 >> 6) | ((b1 & 1) << 2),
        (b1 >> 1) & 7,
        (b1 >> 4) & 7,
        (b1 >> 7) | ((b2 & 3) << 1),
        (b2 >> 2) & 7,
        b2 >> 5,
    )
    return torch.stack(codes, dim=2).view(words.shape[0], -1)[:, :k].contiguous()


@dataclass(frozen=True)
class PackedWeight:
    """One quantised matrix W [N, K] with W[n, k] = scales[n, k // group] · (code[n, k] − 2^(bits−1)).

    ``words`` is int32 [N, ⌈K·bits/32⌉], ``scales`` bfloat16 [N, K/group]; they may be mapped from a file.
    ``group`` divides K; one scale a row is ``group == K``.
    """

    words: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int
    k: int

    def __post_init__(self) -> None:
        assert self.bits in BITS
        assert self.k % self.group == 0
        assert self.words.dtype == torch.int32
        assert self.words.shape == (self.n, packed_words(self.k, self.bits))
        assert self.scales.dtype == SCALE_DTYPE
        assert self.scales.shape == (self.n, self.k // self.group)

    @property
    def n(self) -> int:
        """Output features."""
        return self.words.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that a matrix-vector product has to read."""
        return self.words.nbytes + self.scales.nbytes

    def signed_codes(self) -> torch.Tensor:
        """Codes as int8 [N, K] in [−2^(bits−1), 2^(bits−1))."""
        codes = unpack(self.words, self.bits, self.k)
        return codes.sub_(1 << (self.bits - 1)).view(torch.int8)  # wraps below zero, as two's complement does

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [N, K] that the codes and scales stand for; float32 holds it exactly."""
        codes = self.signed_codes().to(dtype).view(self.n, -1, self.group)
        return (codes * self.scales.to(dtype).unsqueeze(2)).view(self.n, self.k)

    def regrouped(self, group: int) -> PackedWeight:
        """The same weights with a scale for every ``group`` inputs, which divides this one's group: scales repeated."""
        assert self.group % group == 0
        if group == self.group:
            return self
        scales = self.scales.repeat_interleave(self.group // group, dim=1)
        return PackedWeight(self.words, scales, self.bits, group, self.k)

    def to(self, device: torch.device) -> PackedWeight:
        """The same on ``device``."""
        return PackedWeight(self.words.to(device), self.scales.to(device), self.bits, self.group, self.k)

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Rows [start, stop), sharing memory."""
        return PackedWeight(self.words[start:stop], self.scales[start:stop], self.bits, self.group, self.k)
