"""What the kernels of this folder have to compute, in plain torch and float64."""

from __future__ import annotations

import torch

from lbq.runtime.kernels.gemv.reference import activations
from lbq.runtime.kernels.planes import Activations


def value(x: Activations, token: int = 0) -> torch.Tensor:
    """The vector [K] that a projection makes of what it reads of ``token``, float64: normalised where it is to be."""
    planes = x.planes
    found = activations(planes.q, planes.scales, planes.bits, planes.k, planes.block)[token]
    if x.squares is None:
        return found
    return found / (x.squares[token].double().sum() / planes.k + x.eps).sqrt()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """w · x / √(mean(x²) + eps) of the last axis, float64."""
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
