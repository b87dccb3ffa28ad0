"""One token's activations as int8 planes, written by the kernel that has them: see ``triton`` and ``project``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton import cdiv

from lbq.runtime.kernels.gemv import BLOCK, Planes, plane_columns
from lbq.runtime.kernels.gemv.tiles import codes_a_column
from lbq.runtime.kernels.planes import triton as kernels

__all__ = ["Activations", "Normed", "embed", "launch_options", "norm", "plain", "plane_layout"]

AT_ONCE = 8  # blocks of 32 a program


@dataclass(frozen=True)
class Activations:
    """What a projection reads of one token: ``planes`` of x, or of a normalised x with its sums of squares."""

    planes: Planes
    squares: torch.Tensor | None = None  # float32 [⌈K/32⌉]
    eps: float = 0.0

    @staticmethod
    def empty(k: int, bits: int, device: torch.device, *, eps: float | None = None) -> Activations:
        """Room for a vector [k] before a projection of ``bits``; for a normalised one where ``eps`` is given."""
        blocks = cdiv(k, BLOCK)
        # Zeros: columns past the last block are read by nobody, but should not be left to chance.
        q = torch.zeros((1, 2, codes_a_column(bits) // 4, plane_columns(k, bits)), dtype=torch.int32, device=device)
        planes = Planes(q, torch.empty((1, blocks), dtype=torch.float32, device=device), bits, k)
        if eps is None:
            return Activations(planes)
        return Activations(planes, torch.empty(blocks, dtype=torch.float32, device=device), eps)


@dataclass(frozen=True)
class Normed:
    """Where a normalised vector goes, and the norm's weights, float32 [K]."""

    to: Activations
    weight: torch.Tensor

    def __post_init__(self) -> None:
        assert self.to.squares is not None
        assert self.weight.shape == (self.to.planes.k,)
        assert self.weight.dtype == torch.float32


def plane_layout(planes: Planes) -> tuple[int, int, float]:
    """Codes a column, columns, and what is folded into the scales: how the kernels write planes."""
    return codes_a_column(planes.bits), planes.q.shape[3], 2.0 ** (planes.bits - 8)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Programmatic dependent launch: the next kernel's programs start before the last of this one's end. sm_90 on."""
    return {"launch_pdl": True} if pdl else {}


def embed(token: torch.Tensor, table: torch.Tensor, x: torch.Tensor, normed: Normed, *, pdl: bool = False) -> None:
    """Row ``token``, int64 [1], of ``table`` [V, K] into the residual stream ``x`` float32 [K], and its planes.

    With ``pdl`` the next kernel may start early; this one is the first of a step and waits for nobody.
    """
    assert token.dtype == torch.int64
    k = table.shape[1]
    assert x.shape == (k,)
    columns, width, fold = plane_layout(normed.to.planes)
    blocks = cdiv(k, BLOCK)
    kernels.embed[(cdiv(blocks, AT_ONCE),)](
        token,
        table,
        x,
        normed.weight,
        normed.to.planes.q,
        normed.to.planes.scales,
        normed.to.squares,
        k,
        width,
        C=columns,
        FOLD=fold,
        BB=AT_ONCE,
        PDL=pdl,
        num_warps=4,
    )


def norm(x: torch.Tensor, normed: Normed, *, pdl: bool = False) -> None:
    """The residual stream ``x`` float32 [K] into planes."""
    k = normed.to.planes.k
    assert x.shape == (k,)
    columns, width, fold = plane_layout(normed.to.planes)
    kernels.norm[(cdiv(cdiv(k, BLOCK), AT_ONCE),)](
        x,
        normed.weight,
        normed.to.planes.q,
        normed.to.planes.scales,
        normed.to.squares,
        k,
        width,
        C=columns,
        FOLD=fold,
        BB=AT_ONCE,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


def plain(x: torch.Tensor, to: Activations, *, pdl: bool = False) -> None:
    """``x`` float32 [K] into planes, as it is."""
    k = to.planes.k
    assert x.shape == (k,)
    columns, width, fold = plane_layout(to.planes)
    kernels.plain[(cdiv(cdiv(k, BLOCK), AT_ONCE),)](
        x,
        to.planes.q,
        to.planes.scales,
        k,
        width,
        C=columns,
        FOLD=fold,
        BB=AT_ONCE,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
