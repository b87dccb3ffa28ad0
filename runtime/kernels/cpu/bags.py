"""INT8, INT4 and INT3 through FBGEMM's 8-bit embedding bag: a GEMV with float32 activations and float32 sums.

An embedding bag sums the rows of a table, each times a float32 weight. With Wᵀ as the table, the activations as those
weights and one bag for every group of K, it is a matrix-vector product that reads one byte a code and converts it in
registers; the group's scale is applied to the bag's sum. A row of the table carries a float32 factor and offset
behind its codes: they turn an unsigned code into the signed one. FBGEMM generates the loop for AVX2 or AVX-512, and
torch spreads bags over threads. torch's own ``_weight_int8pack_mm`` and ``_weight_int4pack_mm_for_cpu`` round their
outputs to bfloat16, or run scalar code on float32.

Four-bit codes stay packed in memory, two a byte, and are spread over a scratch table right before they are used.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import torch

from lbq.formats.packing import PackedWeight, unpack
from lbq.runtime.kernels.cpu.fbgemm import byte_bags
from lbq.runtime.kernels.cpu.mapped import check_input

SCRATCH_BYTES = 4 << 20  # codes unpacked at a time: more falls out of the cache, less makes more calls
NARROWEST = 512  # columns of a scratch table, if N has them: below, the per-row work of a bag shows
BYTE_COLUMNS = 448  # columns of an INT8 table: what FBGEMM keeps in AVX-512 registers, so that a row is read once
BYTE_SUMS = 1 << 20  # float32 sums that one INT8 call may make: 4 MiB
ROWS_BY_BAGS = 8  # tokens up to which bags are faster than dequantise + matmul
HEADER = 8  # bytes behind a row of codes: float32 factor, float32 offset

_LOW, _HIGH = 0x0F0F0F0F0F0F0F0F, -0x0F0F0F0F0F0F0F10  # eight low, eight high nibbles


class NibbleBagLinear:
    """INT4 and INT3: two codes a byte in memory, shards of [⌈K/2⌉, columns]; INT3 codes are widened to four bits.

    The low nibbles of a shard hold codes of the first half of K, the high nibbles those of the second, so that the
    unpacked table is in the order of K.
    """

    fallback: str | None = None

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        assert weight.bits in (3, 4)
        self.n, self.k, self._bias = weight.n, weight.k, bias
        self.kernel = f"FBGEMM byte bags, INT{weight.bits} unpacked by tiles (CPU)"
        self._half = -(-self.k // 2)
        shards, self._columns = _split_columns(self.n, max(NARROWEST, SCRATCH_BYTES // self.k), 8)
        self._bags = _Bags.of(1, self.k, weight.group, torch.get_num_threads())
        with torch.inference_mode(False):
            self._shards = [
                self._load(weight.rows(s * self._columns, min(self.n, (s + 1) * self._columns))) for s in range(shards)
            ]
        self.resident_bytes = sum(codes.nbytes + scales.nbytes for codes, scales in self._shards)

    def _load(self, rows: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int64 [⌈K/2⌉, columns/8], sixteen a word, and scales float32 [groups, columns] of one shard."""
        codes = torch.zeros(self._half, self._columns, dtype=torch.uint8)
        scales = torch.zeros(rows.k // rows.group, self._columns)
        unpacked = unpack(rows.words, rows.bits, rows.k).t()  # [K, n]
        if rows.bits == 3:
            unpacked = unpacked + 4  # u − 4 == (u + 4) − 8
        codes[:, : rows.n] = unpacked[: self._half]
        codes[: self.k - self._half, : rows.n] |= unpacked[self._half :] << 4
        scales[:, : rows.n] = rows.scales.t()
        return codes.view(torch.int64), scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        check_input(x, self.k)
        table = _scratch(self._half, self._columns)
        parts = []
        for codes, scales in self._shards:
            table.unpack(codes)
            if x.shape[0] <= ROWS_BY_BAGS:
                parts.append(self._bags.dot(table.rows, x, scales))
            else:
                parts.append(x @ self._dequantize(table, scales))
        return _finish(parts, self.n, self._bias)

    def _dequantize(self, table: _Scratch, scales: torch.Tensor) -> torch.Tensor:
        """A shard of Wᵀ, float32 [K, columns], from the unpacked table."""
        tile = table.rows[: self.k, : self._columns].float()
        tile[self._half :].mul_(1 / 16)
        tile.sub_(8).unflatten(0, (scales.shape[0], -1)).mul_(scales.unsqueeze(1))
        return tile


class ByteBagLinear:
    """INT8: the table itself is resident, [shards, K, columns + 8]."""

    kernel = "FBGEMM byte bags, INT8 (CPU)"
    fallback: str | None = None

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        assert weight.bits == 8
        self.n, self.k, self._bias = weight.n, weight.k, bias
        shards, self._columns = _split_columns(self.n, BYTE_COLUMNS, 16)
        groups = self.k // weight.group
        with torch.inference_mode(False):
            self._table = torch.zeros(shards, self.k, self._columns + HEADER, dtype=torch.uint8)
            self._table[:, :, self._columns :] = _header(1.0, -128.0)
            self._scales = torch.zeros(shards, groups, self._columns)
            for s in range(shards):
                rows = weight.rows(s * self._columns, min(self.n, (s + 1) * self._columns))
                self._table[s, :, : rows.n] = unpack(rows.words, 8, rows.k).t()
                self._scales[s, :, : rows.n] = rows.scales.t()
        self.resident_bytes = self._table.nbytes + self._scales.nbytes
        batch = max(1, BYTE_SUMS // (groups * self._columns))  # shards a call
        threads = torch.get_num_threads()
        self._batches = [
            (table.flatten(0, 1), scales.flatten(0, 1), _Bags.of(table.shape[0], self.k, weight.group, threads))
            for table, scales in zip(self._table.split(batch), self._scales.split(batch), strict=True)
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        check_input(x, self.k)
        if x.shape[0] <= ROWS_BY_BAGS:
            parts = [bags.dot(table, x, scales) for table, scales, bags in self._batches]
        else:
            parts = [x @ self._dequantize(s) for s in range(self._table.shape[0])]
        return _finish(parts, self.n, self._bias)

    def _dequantize(self, s: int) -> torch.Tensor:
        """Shard ``s`` of Wᵀ, float32 [K, columns]."""
        tile = self._table[s, :, : self._columns].float()
        tile.sub_(128).unflatten(0, (self._scales.shape[1], -1)).mul_(self._scales[s].unsqueeze(1))
        return tile


@dataclass(frozen=True)
class _Bags:
    """Which rows of a table uint8 [shards·K, columns + 8] go into which sum: one group, or a piece of one, a bag."""

    shards: int
    groups: int
    pieces: int  # of a group
    indices: torch.Tensor  # int32 [shards·K]
    offsets: torch.Tensor  # int32 [shards·groups·pieces + 1]

    @staticmethod
    @functools.cache
    def of(shards: int, k: int, group: int, threads: int) -> _Bags:
        """Layers of one shape share one plan."""
        groups, pieces = k // group, 1
        bags = shards * groups
        if bags < 2 * threads:  # cut the groups, so that every thread has bags to sum
            pieces = max(1, min(-(-4 * threads // bags), group // 16))
        with torch.inference_mode(False):
            starts = torch.arange(0, shards * k, group, dtype=torch.int32).unsqueeze(1)
            starts = starts + torch.arange(pieces, dtype=torch.int32) * group // pieces
            end = torch.tensor([shards * k], dtype=torch.int32)
            indices = torch.arange(shards * k, dtype=torch.int32)
            return _Bags(shards, groups, pieces, indices, torch.cat((starts.flatten(), end)))

    def dot(self, table: torch.Tensor, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 [M, shards·columns] of activations float32 [M, K] and scales float32 [shards·groups, columns]."""
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
        if self.shards == 1:
            return sums if self.groups == 1 else sums.sum(0, keepdim=True)
        return sums.view(self.shards, self.groups, -1).sum(1).view(1, -1) if self.groups > 1 else sums.view(1, -1)


class _Scratch:
    """A table of bytes, [2·half, columns + 8], that packed codes are spread over: low nibbles, then high ones.

    High nibbles stay where they are in their byte: the factor of their rows is 1/16.
    """

    def __init__(self, half: int, columns: int) -> None:
        with torch.inference_mode(False):
            self.rows = torch.zeros(2 * half, columns + HEADER, dtype=torch.uint8)
            self.rows[:half, columns:] = _header(1.0, -8.0)
            self.rows[half:, columns:] = _header(1 / 16, -8.0)
            words = self.rows.view(torch.int64).view(2, half, -1)
            self._codes = words[:, :, : columns // 8]
            self._masks = torch.tensor([_LOW, _HIGH]).view(2, 1, 1)

    def unpack(self, packed: torch.Tensor) -> None:
        """Spread int64 [half, columns/8], sixteen codes a word."""
        torch.bitwise_and(packed, self._masks, out=self._codes)


class _ScratchPool(threading.local):
    """One table a shape and thread, shared by all linears: they run one after another."""

    def __init__(self) -> None:
        self.tables: dict[tuple[int, int], _Scratch] = {}


_pool = _ScratchPool()


def _scratch(half: int, columns: int) -> _Scratch:
    table = _pool.tables.get((half, columns))
    if table is None:
        table = _pool.tables[half, columns] = _Scratch(half, columns)
    return table


def _split_columns(n: int, most: int, multiple: int) -> tuple[int, int]:
    """Shards, and columns of each: even, at most about ``most``, a multiple of ``multiple``."""
    shards = -(-n // most)
    columns = -(-n // shards // multiple) * multiple
    return -(-n // columns), columns


def _header(factor: float, offset: float) -> torch.Tensor:
    return torch.tensor([factor, offset]).view(torch.uint8)


def _finish(parts: list[torch.Tensor], n: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Join columns, drop the padding, add the bias."""
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if y.shape[1] != n:
        y = y[:, :n].contiguous()
    return y if bias is None else y.add_(bias)
