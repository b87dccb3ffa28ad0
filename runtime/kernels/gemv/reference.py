"""What the kernels of this folder have to compute, in plain torch and float64."""

from __future__ import annotations

import torch

from lbq.formats.packing import PackedWeight, unpack
from lbq.runtime.kernels.gemv.tiles import codes_a_column


def gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] · Wᵀ + bias in float64 [M, N]; float32 holds the dequantised weights exactly."""
    y = x.double() @ weight.dequantize(torch.float32).double().t()
    return y if bias is None else y + bias.double()


def split_planes(words: torch.Tensor, k: int) -> torch.Tensor:
    """A dense 3-bit stream int32 [N, ⌈3K/32⌉] → int32 [N, 3, ⌈K/32⌉]; codes past K are zero codes."""
    codes = unpack(words, 3, k)
    codes = torch.nn.functional.pad(codes, (0, -k % 32)).long() ^ 4
    r = codes.view(codes.shape[0], -1, 4, 8).unbind(-1)  # [N, column, byte] each
    byte = 8 * torch.arange(4, device=words.device)
    bytes_ = (
        (r[0] << 5) | (r[1] << 2) | (r[6] & 3),
        (r[2] << 5) | (r[3] << 2) | (r[7] & 3),
        (r[4] << 5) | (r[5] << 2) | (r[6] >> 2 << 1) | (r[7] >> 2),
    )
    planes = torch.stack([(one << byte).sum(dim=2) for one in bytes_], dim=1)
    return torch.where(planes >= 2**31, planes - 2**32, planes).int()


def activations(q: torch.Tensor, scales: torch.Tensor, bits: int, k: int, block: int = 32) -> torch.Tensor:
    """What planes q int32 [M, 2, C/4, columns] and scales [M, ⌈K/block⌉] stand for: float64 [M, K]."""
    c = codes_a_column(bits)
    m, _, r, columns = q.shape
    planes = q.view(torch.int8).view(m, 2, r, columns, 4).permute(0, 1, 3, 4, 2)  # element C·column + (C/4)·i + r
    both = planes[:, 0].double() * 254 + planes[:, 1].double()
    both = both.reshape(m, columns * c)[:, :k]
    return both * scales.double().repeat_interleave(block, dim=1)[:, :k] * 2.0 ** (8 - bits)
