"""INT8 by bags of bytes: the table itself is resident."""

from __future__ import annotations

import torch

from lbq.formats.packing import PackedWeight, unpack
from lbq.runtime.kernels.cpu.bags import HEADER, ROWS_BY_BAGS, even_bags, finish, header, matmul, split_columns
from lbq.runtime.kernels.cpu.mapped import check_input
from lbq.runtime.kernels.linear import Matrix

COLUMNS = 448  # of a table: what FBGEMM keeps in AVX-512 registers, so that memory is read in order
SUMS = 1 << 20  # float32 sums that one call may make: 4 MiB


class ByteBagLinear:
    """A table uint8 [shards, K, columns + 8]: a byte a code, then the header of the row."""

    fallback: str | None = None

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        assert weight.bits == 8
        self.kernel = self.name(8)
        self.n, self.k, self._bias = weight.n, weight.k, bias
        shards, self._columns = split_columns(self.n, COLUMNS)
        groups = self.k // weight.group
        with torch.inference_mode(False):
            self._table = torch.zeros(shards, self.k, self._columns + HEADER, dtype=torch.uint8)
            self._table[:, :, self._columns :] = header(1.0, -128.0)
            self._scales = torch.zeros(shards, groups, self._columns)
            for s in range(shards):
                rows = weight.rows(s * self._columns, min(self.n, (s + 1) * self._columns))
                self._table[s, :, : rows.n] = unpack(rows.words, 8, rows.k).t()
                self._scales[s, :, : rows.n] = rows.scales.t()
        self.resident_bytes = self._table.nbytes + self._scales.nbytes
        batch = max(1, SUMS // (groups * self._columns))  # shards a call
        threads = torch.get_num_threads()
        self._batches = [
            (table.flatten(0, 1), scales.flatten(0, 1), even_bags(table.shape[0], self.k, weight.group, threads))
            for table, scales in zip(self._table.split(batch), self._scales.split(batch), strict=True)
        ]

    @staticmethod
    def name(bits: int) -> str:
        """What ``kernel`` says."""
        return f"FBGEMM byte bags, INT{bits} (CPU)"

    @staticmethod
    def bytes_of(matrix: Matrix) -> int:
        """``resident_bytes`` of a linear."""
        shards, columns = split_columns(matrix.n, COLUMNS)
        return shards * (matrix.k * (columns + HEADER) + 4 * (matrix.k // matrix.group) * columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        check_input(x, self.k)
        if x.shape[0] <= ROWS_BY_BAGS:
            parts = [bags.dot(table, x, scales) for table, scales, bags in self._batches]
        else:
            tables = zip(self._table[:, :, : self._columns], self._scales, strict=True)
            parts = [matmul(x, table, 128, scales) for table, scales in tables]
        return finish(parts, self.n, self._bias)
