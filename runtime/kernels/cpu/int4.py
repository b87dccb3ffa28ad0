"""INT4 and INT3 by bags of bytes: codes stay packed, two a byte, and are spread over a scratch table before use."""

from __future__ import annotations

import threading

import torch

from lbq.formats.packing import PackedWeight, unpack
from lbq.runtime.kernels.cpu.bags import (
    HEADER,
    ROWS_BY_BAGS,
    Bags,
    aligned_bags,
    even_bags,
    finish,
    header,
    matmul,
    split_columns,
)
from lbq.runtime.kernels.cpu.mapped import check_input
from lbq.runtime.kernels.linear import Matrix

SCRATCH_BYTES = 2 << 20  # codes unpacked at a time for each thread: more falls out of the cache, less is more calls
MOST_TABLES = 16  # scratch tables that a Python thread keeps: one for every shape of matrix, and a model has few
NARROWEST = 512  # columns of a scratch table, if N has them: below, the per-row work of a bag shows
MOST_MEMORY = 1.12  # of the stored bytes, for aligned bags: with padding it stays below 1.15


class NibbleBagLinear:
    """INT4 and INT3: two codes a byte in memory; INT3 codes are widened to four bits.

    A shard of columns holds [blocks, 1, half, columns] bytes: K is cut in blocks of 2·half rows, one for each thread;
    low nibbles are a block's first half, high nibbles its second, so that the unpacked table is in the order of K and
    a thread reads and writes one block alone. Blocks and bags are for the number of threads at construction.
    """

    fallback: str | None = None

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        assert weight.bits in (3, 4)
        self.n, self.k, self._group, self._bias = weight.n, weight.k, weight.group, bias
        self.kernel = self.name(weight.bits)
        self._blocks, self._half = _split_rows(self.k)
        self._bags = _choose_bags(self.k, weight.group)
        shards, self._columns = _split_columns(self.n, self.k)
        with torch.inference_mode(False):
            self._shards = [
                self._load(weight.rows(s * self._columns, min(self.n, (s + 1) * self._columns))) for s in range(shards)
            ]
        self.resident_bytes = sum(codes.nbytes + scales.nbytes for codes, scales in self._shards)

    @staticmethod
    def name(bits: int) -> str:
        """What ``kernel`` says."""
        return f"FBGEMM byte bags, INT{bits} unpacked by tiles (CPU)"

    @staticmethod
    def bytes_of(matrix: Matrix) -> int:
        """``resident_bytes`` of a linear."""
        blocks, half = _split_rows(matrix.k)
        shards, columns = _split_columns(matrix.n, matrix.k)
        return shards * columns * (blocks * half + 4 * _choose_bags(matrix.k, matrix.group).bags)

    def _load(self, rows: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 [blocks, 1, half, columns], two a byte, and scales float32 [bags, columns] of one shard."""
        unpacked = torch.zeros(2 * self._blocks * self._half, self._columns, dtype=torch.uint8)
        unpacked[: rows.k, : rows.n] = unpack(rows.words, rows.bits, rows.k).t()
        if rows.bits == 3:
            unpacked += 4  # u − 4 == (u + 4) − 8
        low, high = unpacked.view(self._blocks, 2, self._half, -1).split(1, 1)
        scales = torch.zeros(self._bags.bags, self._columns)
        scales[:, : rows.n] = rows.scales.t()[self._bags.group_of]
        return low | (high << 4), scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        check_input(x, self.k)
        product = self._by_bags if x.shape[0] <= ROWS_BY_BAGS else self._by_matmul
        return finish([product(x, codes, scales) for codes, scales in self._shards], self.n, self._bias)

    def _by_bags(self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        table = _scratch(self._blocks, self._half, self._columns)
        table.unpack(codes)
        return self._bags.dot(table.rows, x, scales)

    def _by_matmul(self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        unpacked = torch.cat((codes & 15, codes >> 4), 1).view(-1, self._columns)[: self.k]
        groups = torch.arange(self.k // self._group)
        return matmul(x, unpacked, 8, scales[torch.searchsorted(self._bags.group_of, groups)])


def _split_rows(k: int) -> tuple[int, int]:
    """Blocks, and half the rows of each."""
    threads = torch.get_num_threads()
    blocks = threads if k % (2 * threads) == 0 else 1
    return blocks, -(-k // (2 * blocks))


def _split_columns(n: int, k: int) -> tuple[int, int]:
    """Shards, and columns of each."""
    return split_columns(n, max(NARROWEST, SCRATCH_BYTES * torch.get_num_threads() // k))


def _choose_bags(k: int, group: int) -> Bags:
    """Aligned bags, unless repeating scales for so many threads would take too much memory."""
    threads = torch.get_num_threads()
    aligned = aligned_bags(k, group, threads)
    fits = k / 2 + 4 * aligned.bags <= MOST_MEMORY * (k / 2 + 2 * (k // group))
    return aligned if fits else even_bags(1, k, group, threads)


class _Scratch:
    """A table of bytes, [blocks·2·half, columns + 8], that packed codes are spread over.

    High nibbles stay where they are in their byte: the factor of their rows is 1/16.
    """

    def __init__(self, blocks: int, half: int, columns: int) -> None:
        with torch.inference_mode(False):
            self.rows = torch.zeros(2 * blocks * half, columns + HEADER, dtype=torch.uint8)
            table = self.rows.view(blocks, 2, half, -1)
            table[:, 0, :, columns:] = header(1.0, -8.0)
            table[:, 1, :, columns:] = header(1 / 16, -8.0)
            self._codes = table[:, :, :, :columns]
            self._masks = torch.tensor([0x0F, 0xF0], dtype=torch.uint8).view(2, 1, 1)

    def unpack(self, packed: torch.Tensor) -> None:
        """Spread uint8 [blocks, 1, half, columns], two codes a byte. torch gives every thread an equal run of rows."""
        torch.bitwise_and(packed, self._masks, out=self._codes)


class _ScratchPool(threading.local):
    """Tables of one Python thread, one a shape, shared by all linears: they run one after another.

    They are not part of any linear's ``resident_bytes`` and outlive it: MOST_TABLES of them, each about SCRATCH_BYTES a
    thread of torch, or NARROWEST · K bytes where that is more.
    """

    def __init__(self) -> None:
        self.tables: dict[tuple[int, int, int], _Scratch] = {}


_pool = _ScratchPool()


def _scratch(blocks: int, half: int, columns: int) -> _Scratch:
    tables, shape = _pool.tables, (blocks, half, columns)
    table = tables.get(shape)
    if table is None:
        if len(tables) >= MOST_TABLES:
            del tables[next(iter(tables))]  # the oldest
        table = tables[shape] = _Scratch(blocks, half, columns)
    return table
