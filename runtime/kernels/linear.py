"""What every kernel looks like to the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Matrix:
    """What a kernel is chosen by: a matrix [n, k] of codes under one scale for ``group`` inputs; 16 bits: of BF16."""

    n: int
    k: int
    bits: int
    group: int
    bias: bool = False


@dataclass(frozen=True)
class Choice:
    """What a :class:`Linear` of some matrix will say of itself: known before there are weights."""

    kernel: str
    fallback: str | None
    resident_bytes: int


class Linear(Protocol):
    """y = x · Wᵀ + bias on one device, by one kernel."""

    kernel: str  # what serves it, in words a user reads: "torch int4pack (CPU)"
    fallback: str | None  # why this is not the fast path, or None: said after a run, an error under --strict
    resident_bytes: int  # memory of its own beyond the mapped file

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        ...
