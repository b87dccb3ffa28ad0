"""What the kernel of this folder has to compute, in plain torch."""

from __future__ import annotations

import torch

from lbq.formats.packing import PackedWeight


def dequantize(weight: PackedWeight, norms: torch.Tensor | None = None) -> torch.Tensor:
    """W [N, K] in float64, over ``norms`` [N] if given; rows whose norm is zero are zero."""
    w = weight.dequantize(torch.float32).double()
    return w if norms is None else torch.where(norms[:, None] > 0, w / norms[:, None].double(), 0.0)
