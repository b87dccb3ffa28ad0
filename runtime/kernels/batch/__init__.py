"""A few tokens' product with packed weights in one pass over the weights, on int8 tensor cores: see ``triton``.

As in ``gemv`` activations are two int8 planes and sums under one scale exact; but one scale is for the 128 elements (64
before INT8) that a tensor core adds at once, not for 32. ``batch`` is the product alone; ``product`` is a projection of
a decode step of several texts, which ends in what the next kernel reads: ``project`` for more tokens than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton import cdiv, next_power_of_2

from lbq.runtime.kernels.batch import triton as kernels
from lbq.runtime.kernels.gemv import ArrangedWeight, Planes, quantize, sm_count
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.planes import Activations, Normed, launch_options
from lbq.runtime.kernels.project import Activation, Kind, constants, operands

__all__ = ["TOKENS", "BatchTile", "batch", "planes", "product", "tile_codes", "tile_for", "why_not"]

TOKENS = 16


@dataclass(frozen=True)
class BatchTile:
    """How a product runs: programs of ``blocks`` times ``rows`` times 16 rows, ``split`` warps to share a row's tiles.

    A warp multiplies ``rows``, 1 or 2, blocks of 16 by the activations that it loads. Those of ``depth`` steps, 1 to 4,
    are on their way with the weights of these while others are multiplied.
    """

    split: int
    blocks: int = 1
    depth: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        assert self.split * self.blocks in (1, 2, 4, 8, 16)
        assert self.depth in (1, 2, 3, 4)
        assert self.rows in (1, 2)

    @property
    def warps(self) -> int:
        return self.split * self.blocks

    def outputs(self, kind: Kind) -> int:
        """Outputs of a program."""
        return self.rows * self.blocks * (8 if kind == "gated" else 16)


def tile_codes(bits: int) -> int:
    """Codes of a row that are added before a scale is applied."""
    return 16 * 32 // bits


def why_not(weight: ArrangedWeight) -> str | None:
    """Why this kernel cannot serve ``weight``, or None where it can."""
    if weight.bits == 3:
        return "3-bit codes"
    codes = tile_codes(weight.bits)
    if weight.group != weight.k and weight.group % codes and weight.group not in (32, 64):
        return f"groups of {weight.group}"
    return None


def planes(x: torch.Tensor, bits: int) -> Planes:
    """Float [M, K] as ``batch`` reads it."""
    return quantize(x, bits, tile_codes(bits))


def tile_for(weight: ArrangedWeight, tokens: int, sm_count: int) -> BatchTile:
    """The rule: within some 5% of what was best of each projection of 8B in INT4 for 2, 4 and 8 tokens on an H200.

    From five tokens on a warp has twice the rows: it is activations that take the time to load then.
    """
    codes = tile_codes(weight.bits)
    tiles = cdiv(weight.k, codes)
    # What registers hold: a tile of several groups needs some for each.
    room = 1 if weight.group != weight.k and weight.group % codes else 2
    rows = room if tokens > 4 else 1
    warps = 32 if weight.bits == 8 and tokens <= 4 else 16  # a multiprocessor, if each had 16 rows
    split = min(8, _power_of_2(warps * sm_count * 16 // weight.n), _power_of_2(tiles // 4))
    steps = cdiv(tiles, split)
    # Sixteen warps have 128 registers a thread, too few for more than eight tokens.
    blocks = 2 if rows == 1 and split == 8 and steps <= 4 and tokens <= 8 else max(1, 4 // split)
    few = steps <= 8 or (weight.bits == 8 and split < 8)
    depth = (4 if few else 2) if tokens <= 4 else room if tokens <= 8 else 1
    return BatchTile(split, blocks, depth, rows)


def _power_of_2(most: int) -> int:
    """The largest power of two that is no more than ``most``; 1 at least."""
    return int(next_power_of_2(most + 1)) // 2 if most > 1 else 1


def batch(
    x: Planes, weight: ArrangedWeight, bias: torch.Tensor | None = None, *, tile: BatchTile | None = None
) -> torch.Tensor:
    """W·x + bias for up to TOKENS tokens: float32 [M, N]. ``bias`` is float32 [N]; ``why_not(weight)`` must be None."""
    y = torch.empty((x.q.shape[0], weight.n), dtype=torch.float32, device=weight.words.device)
    tile = tile or tile_for(weight, x.q.shape[0], sm_count(weight.words.device))
    product(Activations(x), weight, bias, y, kind="store", tile=tile)
    return y


def product(
    x: Activations,
    weight: ArrangedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    kind: Kind,
    tile: BatchTile,
    to: Normed | Activations | None = None,
    counters: torch.Tensor | None = None,
    activation: Activation = "silu",
    pdl: bool = False,
    onward: bool = True,
) -> None:
    """W·x + bias of M ≤ TOKENS tokens, float32, ended as ``kind`` says: as ``project.project``, with ``y`` [M, N].

    ``to`` takes planes of the result; programs that own no whole blocks of them then share ``counters``, of
    ``project.arrivals(N)``. ``why_not(weight)`` must be None.
    """
    m, n = y.shape
    assert why_not(weight) is None
    assert (x.planes.bits, x.planes.k, x.planes.block) == (weight.bits, weight.k, tile_codes(weight.bits))
    assert m == x.tokens
    assert m <= TOKENS
    assert y.is_contiguous()
    outputs = tile.outputs(kind)
    size = 32 if to is None else (to.to if isinstance(to, Normed) else to).planes.block
    assert to is None or outputs % size == 0 or (size % outputs == 0 and counters is not None)
    kernels.batch[(cdiv(n, outputs),)](
        *operands(x, weight, bias, y, kind, to, counters),
        n,
        m,
        FOURS=next_power_of_2(cdiv(m, 4)),
        S=tile.split,
        T=tile.blocks,
        R=tile.rows,
        DEPTH=tile.depth,
        **constants(x, weight, bias, kind, activation, to),
        SIZE_OUT=size,
        PDL=pdl,
        ONWARD=onward,
        EMULATE=INTERPRETED,
        num_warps=tile.warps,
        **launch_options(pdl),
    )
