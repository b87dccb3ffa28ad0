"""What the kernels of this folder have to compute, in plain torch."""

from __future__ import annotations

import torch

_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(seed: int, counter: torch.Tensor, second: int) -> torch.Tensor:
    """The first 32 bits of Philox-4x32-10 for the counters (counter[i], second, 0, 0): int64 of ``counter``'s shape."""
    k0, k1 = seed & _LOW, seed >> 32
    c0, c1 = counter.long(), torch.full_like(counter, second).long()
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        low0, high0 = _product(c0, _M0)
        low1, high1 = _product(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high 32 bits of a · b, both below 2^32, in int64 that never overflows."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return ((middle & 0xFFFF) << 16) | (low & 0xFFFF), middle >> 16


def noise(seed: int, vocabulary: int, position: int) -> torch.Tensor:
    """Gumbel noise float64 [V] of the token after ``position``."""
    bits = philox(seed, torch.arange(vocabulary), position)
    uniform = ((bits >> 9).double() + 0.5) / 8388608
    return -torch.log(-torch.log(uniform))


def penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits of ``seen`` ids divided by ``penalty`` where positive, else times it."""
    x = logits.clone()
    x[seen] = torch.where(x[seen] < 0, x[seen] * penalty, x[seen] / penalty)
    return x


def kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """bool [V]: which tokens may be drawn."""
    scores = logits.double() / temperature
    keep = torch.ones_like(scores, dtype=torch.bool)
    if top_k:
        keep &= scores >= scores.topk(min(top_k, len(scores))).values[-1]
    if top_p < 1.0:
        p = torch.where(keep, (scores - scores.max()).exp(), 0.0)
        above = torch.stack([p[scores > s].sum() for s in scores])
        keep &= above < top_p * p.sum()
    if min_p > 0.0:
        keep &= scores - scores.max() >= torch.tensor(min_p, dtype=torch.float64).log()
    return keep
