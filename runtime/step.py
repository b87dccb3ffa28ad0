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


class HostStep:
    """Positions known to Python: prompts anywhere, single tokens on the CPU."""

    def __init__(self, start: int, length: int, device: torch.device) -> None:
        self._start, self._length, self._device = start, length, device
        self._angles: dict[Rotary, Angles] = {}
        self._masks: dict[int | None, torch.Tensor] = {}

    def angles(self, rotary: Rotary) -> Angles:
        found = self._angles.get(rotary)
        if found is None:
            positions = torch.arange(self._start, self._start + self._length, device=self._device)
            found = self._angles[rotary] = rotary.angles(positions)
        return found

    def store(self, cache: KVCache, kv: torch.Tensor, window: int | None) -> Seen:
        start, length = self._start, self._length
        stop = start + length
        cache.reserve(stop)
        if length == 1:
            cache.kv.select(2, start).copy_(kv.view(2, -1, kv.shape[2]))
        else:
            cache.kv[:, :, start:stop] = kv.unflatten(1, (2, -1)).permute(1, 2, 0, 3)
        first = 0 if window is None else max(0, start + 1 - window)
        k, v = cache.kv.narrow(2, first, stop - first).unbind(0)
        if length == 1:
            return Seen(k, v, None, causal=False)
        if start == 0 and (window is None or stop <= window):
            return Seen(k, v, None, causal=True)
        return Seen(k, v, self._mask(first, window), causal=False)

    def _mask(self, first: int, window: int | None) -> torch.Tensor:
        found = self._masks.get(window)
        if found is None:
            stop = self._start + self._length
            token = torch.arange(self._start, stop, device=self._device).unsqueeze(1)
            found = self._masks[window] = _visible(torch.arange(first, stop, device=self._device), token, window)
        return found


class DeviceStep:
    """One token whose position is a tensor, so that a CUDA graph of the step serves many positions."""

    def __init__(self, position: torch.Tensor, slots: torch.Tensor) -> None:
        """``position``: int64 [1]; ``slots``: int64 0, 1, …, S − 1, the part of a fixed cache that is looked at.

        Position must be below S whenever the step runs.
        """
        assert position.dtype == torch.int64
        assert position.shape == (1,)
        self._position, self._slots = position, slots
        self._angles: dict[Rotary, Angles] = {}
        self._masks: dict[int | None, torch.Tensor] = {}

    def angles(self, rotary: Rotary) -> Angles:
        found = self._angles.get(rotary)
        if found is None:
            found = self._angles[rotary] = rotary.angles(self._position)
        return found

    def store(self, cache: KVCache, kv: torch.Tensor, window: int | None) -> Seen:
        new = kv.view(2, -1, 1, kv.shape[2]).to(cache.kv.dtype)
        cache.kv.index_copy_(2, self._position, new)
        mask = self._masks.get(window)
        if mask is None:
            mask = self._masks[window] = _visible(self._slots, self._position.unsqueeze(1), window)
        k, v = cache.kv.narrow(2, 0, self._slots.shape[0]).unbind(0)
        return Seen(k, v, mask, causal=False)


def _visible(slot: torch.Tensor, token: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool [T, S]: whether the token at position ``token`` [T, 1] sees position ``slot`` [S]."""
    seen = slot <= token
    return seen if window is None else seen & (slot > token - window)
