"""One token's projections of a decode step: products on packed weights that end in what the next kernel reads."""

from __future__ import annotations

from typing import Literal

import torch
from triton import cdiv

from lbq.runtime.kernels.gemv import ArrangedWeight, Tile
from lbq.runtime.kernels.gemv.tiles import codes_a_column
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.planes import Activations, Normed, launch_options, plane_layout
from lbq.runtime.kernels.project import triton as kernels

__all__ = ["Activation", "Kind", "arrivals", "constants", "operands", "project", "project_dense"]

Activation = Literal["silu", "gelu", "gelu_tanh"]
Kind = Literal["store", "add", "gated"]


def arrivals(outputs: int, device: torch.device) -> torch.Tensor:
    """Counters for ``project``, int32, one for 32 outputs: zero before a launch and after it."""
    return torch.zeros(cdiv(outputs, 32), dtype=torch.int32, device=device)


def project(
    x: Activations,
    weight: ArrangedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    kind: Kind,
    tile: Tile,
    to: Normed | Activations | None = None,
    counters: torch.Tensor | None = None,
    activation: Activation = "silu",
    pdl: bool = False,
    onward: bool = False,
    ahead: bool = False,
    early: int = 1,
    following: ArrangedWeight | None = None,
    lines: int = 0,
) -> None:
    """W·x + bias of one token, float32, ended as ``kind`` says.

    "store": into ``y`` [N]. "add": onto the residual stream ``y`` [N]. "gated": W [2N, K] is gate over up, and
    act(gate) · up goes to ``y`` [N]. ``to``, after "add" a :class:`Normed` and after "gated" an :class:`Activations`,
    takes the planes of the result; programs of less than 32 outputs then share ``counters``. Without ``to`` a kernel of
    ``planes`` has to write them. ``pdl``: see ``planes.launch_options``; ``onward``: see ``arrivals.let_in``;
    ``ahead``: call all weights of a program into L2 while it waits; ``early``: steps along K, 1 or 2, whose weights it
    has in registers then; ``lines``: 128 bytes each from the start of every row of ``following`` that the programs
    together call into L2 besides.
    """
    n = y.numel()
    assert y.shape == (n,)
    assert (x.planes.bits, x.planes.k) == (weight.bits, weight.k)
    outputs = tile.owned // 2 if kind == "gated" else tile.owned
    assert outputs >= 1
    assert early in (1, 2)
    assert to is None or outputs % 32 == 0 or counters is not None
    programs = cdiv(n, outputs)
    pitch = 1 if following is None else following.words.numel() // following.n
    lines = 0 if following is None else min(lines, cdiv(pitch, 32))
    whole = tile.rounds > 1
    assert not whole or tile.columns * codes_a_column(weight.bits) >= weight.k
    kernel = kernels.stream if whole else kernels.project
    kernel[(programs,)](
        *operands(x, weight, bias, y, kind, to, counters),
        weight.words if following is None else following.words,
        n,
        0 if following is None else following.n,
        BN=tile.rows,
        BW=tile.columns,
        **constants(x, weight, bias, kind, activation, to),
        PDL=pdl,
        ONWARD=onward,
        AHEAD=ahead,
        **({"ROUNDS": tile.rounds} if whole else {"EARLY": early}),
        NEXT_PITCH=pitch if lines else 1,
        NEXT_LINES=max(lines, 1),
        NEXT_SHARE=cdiv(following.n * lines, programs) if lines and following else 0,
        EMULATE=INTERPRETED,
        num_warps=tile.warps,
        **launch_options(pdl),
    )


def operands(
    x: Activations,
    weight: ArrangedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    kind: Kind,
    to: Normed | Activations | None,
    counters: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """What kernels of projections take first, of one token or several; what is not there is stood in for."""
    n = y.shape[-1]
    assert y.dtype == torch.float32
    assert weight.n == (2 * n if kind == "gated" else n)
    assert bias is None or (bias.shape == (weight.n,) and bias.dtype == torch.float32)
    written = _activations(to)
    if written is not None:
        assert kind == ("add" if isinstance(to, Normed) else "gated")
        assert (written.tokens, written.planes.k) == (x.tokens, n)
    return (
        weight.words,
        weight.scales,
        x.planes.q,
        x.planes.scales,
        y if x.squares is None else x.squares,
        y if bias is None else bias,
        y,
        to.weight if isinstance(to, Normed) else y,
        x.planes.q if written is None else written.planes.q,
        y if written is None else written.planes.scales,
        y if written is None or written.squares is None else written.squares,
        x.planes.q if counters is None else counters,
    )


def constants(
    x: Activations,
    weight: ArrangedWeight,
    bias: torch.Tensor | None,
    kind: Kind,
    activation: Activation,
    to: Normed | Activations | None,
) -> dict[str, int | float | str | None]:
    """What they are compiled for, but for their tiles."""
    written = _activations(to)
    columns, width, fold = (0, 0, 1.0) if written is None else plane_layout(written.planes)
    return {
        "K": weight.k,
        "G": weight.group,
        "BITS": weight.bits,
        "XC": x.planes.q.shape[3],
        "HAS_BIAS": bias is not None,
        "NORMED": x.squares is not None,
        "EPS": x.eps,
        "KIND": kind,
        "ACTIVATION": activation,
        "C_OUT": columns,
        "XC_OUT": width,
        "FOLD_OUT": fold,
    }


def _activations(to: Normed | Activations | None) -> Activations | None:
    return to.to if isinstance(to, Normed) else to


def project_dense(
    x: torch.Tensor,
    norm: torch.Tensor,
    squares: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    block: int = 32,
    rows: int = 4,
    warps: int = 4,
    pdl: bool = False,
) -> None:
    """W·rms_norm(x) + bias into ``y`` float32 [M, N]: ``x`` float32 [M, K] and the sums of ``squares`` of its blocks,
    W [N, K] of a 16-bit type."""
    (n, k), m = weight.shape, squares.shape[0]
    assert norm.shape == (k,)
    assert (x.numel(), y.numel()) == (m * k, m * n)
    assert weight.is_contiguous()
    kernels.project_dense[(cdiv(n, rows) * m,)](
        x,
        norm,
        squares,
        weight,
        y if bias is None else bias,
        y,
        n,
        m,
        K=k,
        BN=rows,
        BK=256 * warps,
        HAS_BIAS=bias is not None,
        EPS=eps,
        SIZE=block,
        PDL=pdl,
        num_warps=warps,
        **launch_options(pdl),
    )
