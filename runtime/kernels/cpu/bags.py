"""A matrix-vector product by FBGEMM's 8-bit embedding bag: float32 activations, float32 sums.

An embedding bag sums rows of a table, each times a float32 weight. With Wᵀ as the table, the activations as those
weights and one bag for every group of K, it is a matrix-vector product that reads one byte a code and converts it in
registers; the group's scale is applied to the bag's sum. A row of the table carries a float32 factor and offset
behind its codes: they turn an unsigned code into the signed one. FBGEMM generates the loop for AVX2 or AVX-512, and
torch gives every thread the same number of bags, one after the other. torch's own ``_weight_int8pack_mm`` and
``_weight_int4pack_mm_for_cpu`` round their outputs to bfloat16, or run scalar code on float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch

from lbq.runtime.kernels.cpu.fbgemm import byte_bags

ROWS_BY_BAGS = 16  # tokens up to which bags are about as fast as dequantise + matmul, or faster
TILE = 1 << 19  # weights that dequantise + matmul takes at a time: 2 MiB of float32
PLANS = 64  # bags that are kept for the next matrix of the shape: 4 bytes for every row of a table
HEADER = 8  # bytes behind a row of codes: float32 factor, float32 offset


@dataclass(frozen=True)
class Bags:
    """Which rows of a table uint8 [≥ shards·K, columns + 8] are summed together: a group, or a piece of one.

    Linears of one shape share it, and none counts it among its ``resident_bytes``.
    """

    shards: int
    pieces: int  # bags whose sums are added before the scale, side by side
    indices: torch.Tensor  # int32 [shards·K]
    offsets: torch.Tensor  # int32 [shards·bags·pieces + 1]
    group_of: torch.Tensor  # int64 [bags]: whose scale a sum of pieces takes

    @property
    def bags(self) -> int:
        """Scales that one column takes."""
        return self.group_of.shape[0]

    def dot(self, table: torch.Tensor, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 [M, shards·columns] of activations float32 [M, K] and scales float32 [shards·bags, columns]."""
        if x.shape[0] == 1:
            return self._dot_row(table, x[0], scales)
        return torch.cat([self._dot_row(table, row, scales) for row in x.unbind(0)])

    def _dot_row(self, table: torch.Tensor, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        if self.shards > 1:
            x = x.repeat(self.shards)
        sums: torch.Tensor = byte_bags(table, self.indices, self.offsets, False, 0, False, x, None, True)
        if self.pieces > 1:
            sums = sums.view(-1, self.pieces, sums.shape[1]).sum(1)
        sums.mul_(scales)
        if self.shards > 1:
            return sums.view(self.shards, self.bags, -1).sum(1).view(1, -1)
        return sums if self.bags == 1 else sums.sum(0, keepdim=True)


@functools.lru_cache(PLANS)
def even_bags(shards: int, k: int, group: int, threads: int) -> Bags:
    """One bag a group; groups are cut in equal pieces where there would be too few for the threads."""
    pieces = 1
    if shards * (k // group) < 2 * threads:
        pieces = max(1, min(-(-4 * threads // (shards * (k // group))), group // 16))
    starts = [g + i * group // pieces for g in range(0, shards * k, group) for i in range(pieces)]
    return _bags(shards, pieces, k, starts, range(k // group))


@functools.lru_cache(PLANS)
def aligned_bags(k: int, group: int, threads: int) -> Bags:
    """Bags that also end where a table of K rows (one more if odd) falls into equal parts, one for each thread.

    A thread then sums the very rows that it wrote: rows in another core's cache cost several times as much. A group
    that two threads share is two bags with the same scale; threads with fewer bags get empty ones.
    """
    table = k + k % 2
    cuts = [min(k, round(table * t / threads)) for t in range(threads + 1)]
    parts = [[a, *range((a // group + 1) * group, b, group)] for a, b in pairwise(cuts)]
    most = max(len(part) for part in parts)
    starts = [s for part, end in zip(parts, cuts[1:], strict=True) for s in part + [end] * (most - len(part))]
    return _bags(1, 1, k, starts, [min(s, k - 1) // group for s in starts])


def _bags(shards: int, pieces: int, k: int, starts: list[int], group_of: list[int] | range) -> Bags:
    with torch.inference_mode(False):
        indices = torch.arange(shards * k, dtype=torch.int32)
        offsets = torch.tensor([*starts, shards * k], dtype=torch.int32)
        return Bags(shards, pieces, indices, offsets, torch.tensor(group_of))


def matmul(x: torch.Tensor, codes: torch.Tensor, zero: int, scales: torch.Tensor) -> torch.Tensor:
    """For many tokens: float32 [M, n] of x float32 [M, K], unsigned codes uint8 [K, n] and scales float32 [groups, n].

    Tiles of columns become float32, exactly, and are multiplied.
    """
    k, n = codes.shape
    width = max(16, TILE // k)
    y = torch.empty(x.shape[0], n)
    for a in range(0, n, width):
        tile = codes[:, a : a + width].to(torch.float32, memory_format=torch.contiguous_format).sub_(zero)
        tile.view(scales.shape[0], k // scales.shape[0], -1).mul_(scales[:, a : a + width].unsqueeze(1))
        y[:, a : a + width] = x @ tile
    return y


def header(factor: float, offset: float) -> torch.Tensor:
    """uint8 [8]: what turns a row's codes u into factor · u + offset."""
    return torch.tensor([factor, offset]).view(torch.uint8)


def split_columns(n: int, most: int) -> tuple[int, int]:
    """Shards, and columns of each: even, about ``most`` at most, whole vectors of 16 where that pads little."""
    shards = -(-n // most)
    columns = -(-n // shards)
    if n >= 1024:
        columns = -(-columns // 16) * 16
    return -(-n // columns), columns


def finish(parts: list[torch.Tensor], n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Join columns, drop the padding, add the bias."""
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if y.shape[1] != n:
        y = y[:, :n].contiguous()
    return y if bias is None else y.add_(bias)
