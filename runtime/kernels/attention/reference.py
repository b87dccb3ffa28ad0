"""What the kernel of this folder has to compute, in plain torch and float64."""

from __future__ import annotations

import torch

from lbq.runtime.kernels.attention import Heads, Norms
from lbq.runtime.kernels.planes.reference import rms_norm


def turned(x: torch.Tensor, dims: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads [·, D] with the first ``dims`` turned by cosines and sines [dims/2], halves paired."""
    a, b, rest = x[:, : dims // 2], x[:, dims // 2 : dims], x[:, dims:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=1)


def new_entry(
    qkv: torch.Tensor,
    heads: Heads,
    q_norm: Norms | None,
    k_norm: Norms | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [heads, D], k and v [kv_heads, D] of the new token, float64, ready for the cache and the scores."""
    q, k, v = qkv.double().view(-1, heads.dim).split((heads.kv_heads * heads.group, heads.kv_heads, heads.kv_heads))
    q = q if q_norm is None else rms_norm(q, q_norm.weight, q_norm.eps)
    k = k if k_norm is None else rms_norm(k, k_norm.weight, k_norm.eps)
    cos, sin = cos.double(), sin.double()
    return turned(q, heads.rope_dims, cos, sin), turned(k, heads.rope_dims, cos, sin), v


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads) -> torch.Tensor:
    """q [heads, D] over all of k and v [kv_heads, S, D], the newest last, or the window's end of them: [heads · D]."""
    first = 0 if heads.window is None else max(0, k.shape[1] - heads.window)
    k, v = (x[:, first:].double().repeat_interleave(heads.group, dim=0) for x in (k, v))
    weights = torch.einsum("hd,hsd->hs", q.double(), k).mul(heads.scale).softmax(-1)
    return torch.einsum("hs,hsd->hd", weights, v).flatten()
