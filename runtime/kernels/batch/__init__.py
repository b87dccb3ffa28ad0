"""A few tokens' product with packed weights in one pass over the weights, on int8 tensor cores: see ``triton``.

As in ``gemv`` activations are two int8 planes and sums under one scale exact; but one scale is for the 128 elements (64
before INT8) that a tensor core adds at once, not for 32. ``batch`` is the product alone; ``product`` is a projection of
a decode step of several texts, which ends in what the next kernel reads: ``project`` for more tokens than one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import torch
from triton import cdiv, next_power_of_2

from lbq.runtime.kernels.batch import triton as kernels
from lbq.runtime.kernels.gemv import ArrangedWeight, Planes, quantize, sm_count
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.planes import Activations, Normed, launch_options
from lbq.runtime.kernels.project import Activation, Kind, constants, operands

__all__ = ["TOKENS", "BatchTile", "batch", "planes", "product", "tile_codes", "tile_for", "why_not"]

TOKENS = 16
WARPS_A_PROCESSOR = 12
STEPS_A_WARP = 8


@dataclass(frozen=True)
class BatchTile:
    """How a product runs: programs of ``blocks`` times 16 rows, ``split`` warps to share a row's tiles.

    Weights of ``depth`` steps, 1 or 2, are on their way while one is multiplied.
    """

    split: int
    blocks: int = 1
    depth: int = 1

    def __post_init__(self) -> None:
        assert self.split * self.blocks in (1, 2, 4, 8, 16)
        assert self.depth in (1, 2)

    @property
    def warps(self) -> int:
        return self.split * self.blocks

    def outputs(self, kind: Kind) -> int:
        """Outputs of a program."""
        return self.blocks * (8 if kind == "gated" else 16)


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


def tile_for(n: int, k: int, bits: int, sm_count: int, kind: Kind = "store") -> BatchTile:
    """The rule for a matrix [n, k]: what was best at four tokens of 8B's shapes on an H200, or within 3% of it."""
    tiles = cdiv(k, tile_codes(bits))
    wanted = 2 ** round(log2(max(1.0, WARPS_A_PROCESSOR * sm_count * 16 / n)))
    split = max(2, min(8, wanted, next_power_of_2(tiles // STEPS_A_WARP + 1) // 2))
    return BatchTile(1 if tiles == 1 else split, 1 if kind == "store" else 2, depth=2)


def batch(
    x: Planes, weight: ArrangedWeight, bias: torch.Tensor | None = None, *, tile: BatchTile | None = None
) -> torch.Tensor:
    """W·x + bias for up to TOKENS tokens: float32 [M, N]. ``bias`` is float32 [N]; ``why_not(weight)`` must be None."""
    y = torch.empty((x.q.shape[0], weight.n), dtype=torch.float32, device=weight.words.device)
    tile = tile or tile_for(weight.n, weight.k, weight.bits, sm_count(weight.words.device))
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
        FOURS=cdiv(m, 4),
        S=tile.split,
        T=tile.blocks,
        DEPTH=tile.depth,
        **constants(x, weight, bias, kind, activation, to),
        SIZE_OUT=size,
        PDL=pdl,
        EMULATE=INTERPRETED,
        num_warps=tile.warps,
        **launch_options(pdl),
    )
