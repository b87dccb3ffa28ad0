"""Activations of one token or a few as int8 planes, written by the kernel that has them: see ``triton``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton import cdiv

from lbq.runtime.kernels.gemv import BLOCK, Planes, plane_columns
from lbq.runtime.kernels.gemv.tiles import codes_a_column
from lbq.runtime.kernels.planes import triton as kernels

__all__ = ["Activations", "Normed", "embed", "launch_options", "norm", "plain", "plane_layout"]

AT_ONCE = 256  # elements a program


@dataclass(frozen=True)
class Activations:
    """What a projection reads of M tokens: ``planes`` of x, or of a normalised x with its sums of squares."""

    planes: Planes
    squares: torch.Tensor | None = None  # float32 [M, ⌈K/block⌉]
    eps: float = 0.0

    @staticmethod
    def empty(
        k: int,
        bits: int,
        device: torch.device,
        *,
        eps: float | None = None,
        tokens: int = 1,
        block: int = BLOCK,
    ) -> Activations:
        """Room for vectors [tokens, k] before a projection of ``bits``, a scale for ``block`` elements; for normalised
        ones where ``eps`` is given."""
        blocks = cdiv(k, block)
        shape = (tokens, 2, codes_a_column(bits) // 4, plane_columns(k, bits))
        # Zeros: columns past the last block are read by nobody, but should not be left to chance.
        q = torch.zeros(shape, dtype=torch.int32, device=device)
        planes = Planes(q, torch.empty((tokens, blocks), dtype=torch.float32, device=device), bits, k, block)
        if eps is None:
            return Activations(planes)
        return Activations(planes, torch.empty((tokens, blocks), dtype=torch.float32, device=device), eps)

    @property
    def tokens(self) -> int:
        return self.planes.q.shape[0]


@dataclass(frozen=True)
class Normed:
    """Where normalised vectors go, and the norm's weights, float32 [K]."""

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
    """Rows ``token``, int64 [M], of ``table`` [V, K] into the residual stream ``x`` float32 [M, K], and its planes.

    With ``pdl`` the next kernel may start early; this one is the first of a step and waits for nobody.
    """
    assert token.dtype == torch.int64
    k = table.shape[1]
    _check(x, k, normed.to)
    assert token.numel() == normed.to.tokens
    kernels.embed[_grid(normed.to)](
        token,
        table,
        x,
        normed.weight,
        normed.to.planes.q,
        normed.to.planes.scales,
        normed.to.squares,
        k,
        **_layout(normed.to),
        PDL=pdl,
        num_warps=4,
    )


def norm(x: torch.Tensor, normed: Normed, *, pdl: bool = False, onward: bool = True) -> None:
    """The residual stream ``x`` float32 [M, K] into planes."""
    k = normed.to.planes.k
    _check(x, k, normed.to)
    kernels.norm[_grid(normed.to)](
        x,
        normed.weight,
        normed.to.planes.q,
        normed.to.planes.scales,
        normed.to.squares,
        k,
        **_layout(normed.to),
        PDL=pdl,
        ONWARD=onward,
        num_warps=4,
        **launch_options(pdl),
    )


def plain(x: torch.Tensor, to: Activations, *, pdl: bool = False, onward: bool = True) -> None:
    """``x`` float32 [M, K] into planes, as it is."""
    k = to.planes.k
    _check(x, k, to)
    kernels.plain[_grid(to)](
        x,
        to.planes.q,
        to.planes.scales,
        k,
        **_layout(to),
        PDL=pdl,
        ONWARD=onward,
        num_warps=4,
        **launch_options(pdl),
    )


def _layout(to: Activations) -> dict[str, int | float]:
    """How a kernel writes planes, and how many blocks a program."""
    columns, width, fold = plane_layout(to.planes)
    block = to.planes.block
    return {"XC": width, "C": columns, "FOLD": fold, "BB": AT_ONCE // block, "SIZE": block}


def _grid(to: Activations) -> tuple[int, int]:
    return cdiv(to.planes.k, AT_ONCE), to.tokens


def _check(x: torch.Tensor, k: int, to: Activations) -> None:
    """``x``: [M, K], or [K] of one token."""
    assert to.planes.k == k
    assert x.numel() == to.tokens * k
    assert x.shape[-1] == k
    assert x.is_contiguous()
    assert to.planes.block in (32, 64, 128)
