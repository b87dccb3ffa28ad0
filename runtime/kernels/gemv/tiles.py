"""Which tile of the matrix-vector kernel serves which shape: a rule, so that nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A program's share: ``rows`` outputs, and K ``columns`` at a time, on ``warps`` warps; all powers of two.

    Two kinds keep every value in its thread up to the last sum. Either the tile is as wide as its warps read at 16
    bytes a thread (128 columns a warp), or it is so narrow that threads outnumber the columns, and Triton gives each
    thread its own copy of the activations instead of passing them through shared memory.
    """

    rows: int
    columns: int
    warps: int
    rounds: int = 1  # of a program, each of ``rows``; whole rows then, past activations that stay in registers

    def __post_init__(self) -> None:
        if self.rounds > 1:
            assert self.columns % (128 * self.warps) == 0
            return
        assert self.rows in (1, 2, 4, 8, 16, 32, 64)
        assert self.warps in (1, 2, 4, 8, 16)
        assert self.columns == 128 * self.warps or self.columns in (32, 64, 128)
        assert self.columns == 128 * self.warps or self.columns < 32 * self.warps


def codes_a_column(bits: int) -> int:
    """Codes in one column of a packed row: one word at 8 and 4 bits, three at 3 bits."""
    return 32 if bits == 3 else 32 // bits


def tile(n: int, k: int, bits: int, sm_count: int) -> Tile:
    """The tile for W [n, k] on a GPU of ``sm_count`` multiprocessors.

    Two rows and one warp a program, which on an H200 is the best or within 5% of it wherever N gives every
    multiprocessor work (``scripts/gpu_check.py --tune``, docs/gpu-kernels.md); more warps where N does not, and for
    rows so long that their steps, all unrolled, would be many. Short rows get a narrow tile of more rows.
    """
    columns = -(-k // codes_a_column(bits))
    if columns <= 32:
        rows, width, warps = 16, 32, 2
    elif columns <= 64:
        rows, width, warps = 16, 64, 4
    else:
        rows, warps = 2, 1
        while warps < 4 and 128 * warps < columns and (n < 32 * sm_count * warps or columns > 2048 * warps):
            warps *= 2
        width = 128 * warps
    while rows > 1 and n < 4 * sm_count * rows:
        rows //= 2
    return Tile(rows, width, warps)
