"""Which tile of the matrix-vector kernel serves which shape: a rule, so that nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

from triton import next_power_of_2


@dataclass(frozen=True)
class Tile:
    """A program's share: ``rows`` outputs, and K ``columns`` at a time, on ``warps`` warps; all powers of two.

    Two kinds keep every value in its thread up to the last sum. Either the tile is as wide as its warps read at 16
    bytes a thread (128 columns a warp), or it is so narrow that threads outnumber the columns, and Triton gives each
    thread its own copy of the activations instead of passing them through shared memory.

    A program of ``project`` may go through several ``rounds`` of ``rows``: a third kind, as wide as the rows are long,
    so that the activations are loaded once and stay in registers (``whole_rows``).
    """

    rows: int
    columns: int
    warps: int
    rounds: int = 1

    def __post_init__(self) -> None:
        assert self.rows in (1, 2, 4, 8, 16, 32, 64)
        assert self.warps in (1, 2, 4, 8, 16)
        assert self.rounds in (1, 2, 4, 8)
        if self.rounds > 1:
            assert self.columns in [128 * self.warps * loads for loads in (1, 2, 4, 8)]
            return
        assert self.columns == 128 * self.warps or self.columns in (32, 64, 128)
        assert self.columns == 128 * self.warps or self.columns < 32 * self.warps

    @property
    def owned(self) -> int:
        """Rows of a program."""
        return self.rows * self.rounds


def whole_rows(k: int, bits: int, rows: int, rounds: int, loads: int) -> Tile | None:
    """The tile of ``rounds`` of whole rows of ``k`` codes, of which a thread has ``loads`` times 16 bytes (or, at 3
    bits, three times as many); None where that takes more than 16 warps."""
    columns = max(128, next_power_of_2(-(-k // codes_a_column(bits))))
    warps = max(1, columns // (128 * loads))
    return Tile(rows, columns, warps, rounds) if warps <= 16 else None


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
