"""What a decoder remembers between tokens: one state a layer, made by the layer's mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

FIRST_CAPACITY = 512


class MixerState(Protocol):
    """What one mixer remembers of the tokens it has seen."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        ...


class KVCache:
    """Keys and values of one attention layer, [2, kv_heads, capacity, head_dim].

    With ``fixed`` the whole context is allocated at once and its address never changes, which a CUDA graph needs.
    Otherwise the capacity doubles when it is used up. Slots are zeroed, not left to chance: a masked slot is still
    multiplied by zero, and zero times NaN is NaN.
    """

    def __init__(
        self, kv_heads: int, head_dim: int, context: int, *, dtype: torch.dtype, device: torch.device, fixed: bool
    ) -> None:
        self.context = context
        capacity = context if fixed else min(context, FIRST_CAPACITY)
        self.kv = torch.zeros(2, kv_heads, capacity, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions, at most ``context``."""
        assert length <= self.context
        capacity = self.kv.shape[2]
        if length > capacity:
            grown = self.kv.new_zeros(
                *self.kv.shape[:2], min(self.context, max(length, 2 * capacity)), self.kv.shape[3]
            )
            grown[:, :, :capacity] = self.kv
            self.kv = grown

    def truncate(self, length: int) -> None:
        """Nothing to do: slots from ``length`` on are written before they are read."""


@dataclass
class DecoderState:
    """One sequence: how many tokens it has, how many it can have, and what each layer remembers."""

    context: int
    layers: list[MixerState]
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the layers hold."""
        return sum(layer.nbytes for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        assert 0 <= length <= self.length
        for layer in self.layers:
            layer.truncate(length)
        self.length = length
