"""What every kernel looks like to the decoder."""

from __future__ import annotations

from typing import Protocol

import torch


class Linear(Protocol):
    """y = x · Wᵀ + bias on one device, by one kernel."""

    kernel: str  # what serves it, in words a user reads: "torch int4pack (CPU)"
    fallback: str | None  # why this is not the fast path, or None: said after a run, an error under --strict
    resident_bytes: int  # memory of its own beyond the mapped file

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        ...
