"""One forward pass as all layers see it: which positions it covers, their angles, what each token may look at."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from lbq.runtime.cache import KVCache
from lbq.runtime.rope import Rotary

Angles = tuple[torch.Tensor, torch.Tensor]


class Seen(NamedTuple):
    """Keys and values [kv_heads, S, head_dim] and which of them each of T tokens sees.

    ``mask`` is bool [T, S]; without one, every token sees all S, or with ``causal`` token t sees the first t + 1.
    """

    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    causal: bool


class Step(Protocol):
    """A forward pass over T new tokens."""

    def angles(self, rotary: Rotary) -> Angles:
        """Cosines and sines of the new positions."""
        ...

    def store(self, cache: KVCache, kv: torch.Tensor, window: int | None) -> Seen:
        """Append the new keys and values, [T, 2 · kv_heads, head_dim], and return what the new tokens see."""
        ...


class _Positions:
    """What layers that share a rope or a window compute once a pass."""

    def __init__(self, positions: torch.Tensor) -> None:
        """``positions``: int64 [T], of the new tokens."""
        self._positions = positions
        self._angles: dict[Rotary, Angles] = {}
        self._masks: dict[int | None, torch.Tensor] = {}

    def angles(self, rotary: Rotary) -> Angles:
        """Cosines and sines of the new positions."""
        found = self._angles.get(rotary)
        if found is None:
            found = self._angles[rotary] = rotary.angles(self._positions)
        return found

    def _mask(self, slots: torch.Tensor, window: int | None) -> torch.Tensor:
        """bool [T, S]: whether each new token sees positions ``slots``, int64 [S], the same at each call."""
        found = self._masks.get(window)
        if found is None:
            token = self._positions.unsqueeze(1)
            found = slots <= token
            if window is not None:
                found &= slots > token - window
            self._masks[window] = found
        return found


class HostStep(_Positions):
    """Positions known to Python: prompts anywhere, single tokens on the CPU."""

    def __init__(self, start: int, length: int, device: torch.device) -> None:
        super().__init__(torch.arange(start, start + length, device=device))
        self._start, self._length = start, length

    def store(self, cache: KVCache, kv: torch.Tensor, window: int | None) -> Seen:
        """See :class:`Step`."""
        start, length = self._start, self._length
        stop = start + length
        cache.reserve(stop)
        if length == 1 and cache.scales is None:  # a decode step on the CPU, where each call counts
            cache.kv.select(2, start).copy_(kv.view(2, -1, kv.shape[2]))
        else:
            cache.put(slice(start, stop), kv)
        first = 0 if window is None else max(0, start + 1 - window)
        k, v = cache.held(first, stop)
        if length == 1:
            return Seen(k, v, None, causal=False)
        if start == 0 and (window is None or stop <= window):
            return Seen(k, v, None, causal=True)
        return Seen(k, v, self._mask(torch.arange(first, stop, device=kv.device), window), causal=False)


class DeviceStep(_Positions):
    """One token whose position is a tensor, so that a CUDA graph of the step serves many positions."""

    def __init__(self, position: torch.Tensor, slots: torch.Tensor) -> None:
        """``position``: int64 [1]; ``slots``: int64 0, 1, …, S − 1, the part of a fixed cache that is looked at.

        Position must be below S whenever the step runs.
        """
        assert position.dtype == torch.int64
        assert position.shape == (1,)
        super().__init__(position)
        self._slots = slots

    def store(self, cache: KVCache, kv: torch.Tensor, window: int | None) -> Seen:
        """See :class:`Step`."""
        cache.put(self._positions, kv)
        k, v = cache.held(0, self._slots.shape[0])
        return Seen(k, v, self._mask(self._slots, window), causal=False)
