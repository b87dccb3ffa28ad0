"""What a decoder remembers between tokens: one state a layer, made by the layer's mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lbq.runtime.turn import Turn

FIRST_CAPACITY = 512
TINY = 1e-30  # the least scale: it has a logarithm and an inverse


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

    As int8, every key and every value of a head has a scale of its own, its largest magnitude / 127: ``scales`` float32
    [2, kv_heads, capacity], else None; and keys are turned first, by ``turn``.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        context: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fixed: bool,
        turn: Turn | None = None,
    ) -> None:
        """``turn``: of int8 keys; by default one that knows nothing of them."""
        self.context = context
        capacity = context if fixed else min(context, FIRST_CAPACITY)
        self.kv = torch.zeros(2, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.scales: torch.Tensor | None = None
        self.turn: Turn | None = None
        if dtype == torch.int8:
            self.turn = turn or Turn.plain(kv_heads, head_dim, device)
            self.scales = torch.zeros(2, kv_heads, capacity, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions, at most ``context``."""
        assert length <= self.context
        capacity = self.kv.shape[2]
        if length > capacity:
            capacity = min(self.context, max(length, 2 * capacity))
            self.kv = _grown(self.kv, capacity)
            if self.scales is not None:
                self.scales = _grown(self.scales, capacity)

    def put(self, slots: slice | torch.Tensor, new: torch.Tensor) -> None:
        """Keys and values of T tokens, float [T, 2 · kv_heads, head_dim], into T ``slots``: a slice or int64 [T]."""
        entries = new.unflatten(1, (2, -1)).permute(1, 2, 0, 3)
        if self.turn is not None and self.scales is not None:
            entries, scales = eight(torch.stack((self.turn.turned(entries[0]), entries[1])))
            _put(self.scales, slots, scales)
        _put(self.kv, slots, entries)

    def held(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, stop − first, head_dim] of slots from ``first`` on.

        Where they are int8, a copy of them: float16 on a GPU, float32 elsewhere.
        """
        kv = self.kv[:, :, first:stop]
        if self.turn is None or self.scales is None:
            return kv[0], kv[1]
        kv = kv * self.scales[:, :, first:stop, None]
        k, v = self.turn.back(kv[0]), kv[1]
        return (k.half(), v.half()) if kv.is_cuda else (k, v)

    def truncate(self, length: int) -> None:
        """Nothing to do: slots from ``length`` on are written before they are read."""


def eight(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [..., n] as int8 and their scales, float32 [...]."""
    scales = (x.abs().amax(-1).float() / 127).clamp(min=TINY)
    return (x / scales.unsqueeze(-1) + 0.5).floor().to(torch.int8), scales


def _grown(slots: torch.Tensor, capacity: int) -> torch.Tensor:
    grown = slots.new_zeros(*slots.shape[:2], capacity, *slots.shape[3:])
    grown[:, :, : slots.shape[2]] = slots
    return grown


def _put(to: torch.Tensor, slots: slice | torch.Tensor, new: torch.Tensor) -> None:
    if isinstance(slots, slice):
        to[:, :, slots] = new
    else:
        to.index_copy_(2, slots, new.to(to.dtype))


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
