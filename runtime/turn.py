"""How keys are turned before they are rounded to a few bits, so that none of their elements stands out.

Scores stay what they are if keys are multiplied by a matrix and queries by the transpose of its inverse. Here keys are
divided by units and multiplied by a Hadamard matrix: it spreads what is large over all elements (QuaRot, Ashkboos et
al. 2024), and the units share magnitudes out between queries and keys (SmoothQuant, Xiao et al. 2023). An error of a
score is q · u times one of the key, which is in proportion to |k / u|, so that u² = |k| / |q| makes it least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LARGEST = 128  # elements that are summed: kernels hold one block of signs, and 256 would take 128 kB of shared memory


@dataclass(frozen=True)
class Turn:
    """What the keys of one layer are multiplied by: ``units`` float32 [kv_heads, dim], above zero, and ``signs``.

    ``signs`` float16 [dim, dim] are ``hadamard(dim)``, 1 and −1, so that nothing is rounded. Each turned element is a
    sum of ``size`` others: turned keys are √size times as long, and queries are divided by it.
    """

    units: torch.Tensor
    signs: torch.Tensor
    size: int

    @staticmethod
    def of(units: torch.Tensor) -> Turn:
        """By these units."""
        dim = units.shape[1]
        return Turn(units, hadamard(dim).to(units.device, torch.float16), block(dim))

    @staticmethod
    def plain(kv_heads: int, dim: int, device: torch.device) -> Turn:
        """By the signs alone."""
        return Turn.of(torch.ones(kv_heads, dim, device=device))

    def turned(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [kv_heads, T, dim] as they are rounded, float32."""
        return keys.float() / self.units[:, None] @ self.signs.float()

    def back(self, keys: torch.Tensor) -> torch.Tensor:
        """The keys that :meth:`turned` made these of."""
        return keys @ (self.signs.to(keys.dtype) / self.size) * self.units[:, None]


def block(dim: int) -> int:
    """The largest power of two up to LARGEST that divides ``dim``."""
    return min(dim & -dim, LARGEST)


def hadamard(dim: int) -> torch.Tensor:
    """Sylvester's Hadamard matrices of ``block(dim)`` along the diagonal, float32 [dim, dim]: symmetric, H² = size."""
    signs = torch.ones(1, 1)
    for _ in range(int(math.log2(block(dim)))):
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return torch.kron(torch.eye(dim // block(dim)), signs)
