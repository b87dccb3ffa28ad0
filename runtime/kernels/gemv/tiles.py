"""Which tile of the matrix-vector kernel serves which shape: a rule, so that nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS_A_WARP = 128  # 16 bytes a thread: see the layout note in gemv/triton.py


@dataclass(frozen=True)
class Tile:
    """``rows`` outputs a program (a power of two) and ``warps`` warps; K is walked 128·warps columns at a time."""

    rows: int
    warps: int

    def __post_init__(self) -> None:
        assert self.rows in (1, 2, 4, 8, 16)
        assert self.warps in (1, 2, 4, 8)

    @property
    def columns(self) -> int:
        return COLUMNS_A_WARP * self.warps


def codes_a_column(bits: int) -> int:
    """Codes in one column of a packed row: one word at 8 and 4 bits, three at 3 bits."""
    return 32 if bits == 3 else 32 // bits


def tile(n: int, k: int, bits: int, sm_count: int) -> Tile:
    """The tile for W [n, k] on a GPU of ``sm_count`` multiprocessors.

    Enough warps to take the whole row in one step, up to four; four rows a program, fewer where that would leave the
    GPU with under four programs a multiprocessor.
    """
    columns = -(-k // codes_a_column(bits))
    warps = 1
    while warps < 4 and warps * COLUMNS_A_WARP < columns:
        warps *= 2
    rows = 4
    while rows > 1 and n < 4 * sm_count * rows:
        rows //= 2
    return Tile(rows, warps)
