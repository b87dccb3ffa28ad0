"""What a decoder remembers between tokens: one state a layer, made by the layer's mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lbq.runtime.turn import Turn

FIRST_CAPACITY = 512
PACKED = (torch.int8, torch.uint8)  # types of caches in few bits: 8 and 4
TINY = 1e-30  # the least scale: it has a logarithm and an inverse


def width_of(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` that a key takes."""
    return head_dim // 2 if dtype == torch.uint8 else head_dim


def name_of(dtype: torch.dtype) -> str:
    """What keys and values of a cache of ``dtype`` are: float16, float32, int8, int4."""
    return "int4" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")


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
    [2, kv_heads, capacity], else None; and keys are turned first, by ``turn``. As uint8 they have four bits each,
    [2, kv_heads, capacity, head_dim / 2], codes from −7 to 7 under a scale: a byte has element d, plus 8, in its low
    nibble and element head_dim / 2 + d in its high one; values are turned too, by signs alone.
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
        self.kv = torch.zeros(2, kv_heads, capacity, width_of(head_dim, dtype), dtype=dtype, device=device)
        self.scales: torch.Tensor | None = None
        self.turn: Turn | None = None
        if dtype in PACKED:
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
            entries, scales = packed(entries, self.turn, self.kv.dtype)
            _put(self.scales, slots, scales)
        _put(self.kv, slots, entries)

    def held(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, stop − first, head_dim] of slots from ``first`` on.

        Where they are int8, a copy of them: float16 on a GPU, float32 elsewhere.
        """
        kv = self.kv[:, :, first:stop]
        if self.turn is None or self.scales is None:
            return kv[0], kv[1]
        k, v = opened(kv, self.scales[:, :, first:stop], self.turn)
        return (k.half(), v.half()) if kv.is_cuda else (k, v)

    def truncate(self, length: int) -> None:
        """Nothing to do: slots from ``length`` on are written before they are read."""


def packed(new: torch.Tensor, turn: Turn, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [2, kv_heads, T, head_dim] as a cache of ``dtype``, of PACKED, keeps them; and their scales."""
    keys, values = turn.turned(new[0]), new[1].float()
    if dtype == torch.uint8:
        values = values @ turn.signs.float()
    x = torch.stack((keys, values))
    scales = (x.abs().amax(-1) / (7 if dtype == torch.uint8 else 127)).clamp(min=TINY)
    codes = (x / scales.unsqueeze(-1) + 0.5).floor()
    if dtype == torch.int8:
        return codes.to(torch.int8), scales
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4, scales


def opened(kv: torch.Tensor, scales: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values [kv_heads, T, head_dim] of which :func:`packed` made ``kv``, in the type of ``scales``."""
    codes = kv if kv.dtype == torch.int8 else torch.cat((kv & 15, kv >> 4), dim=-1).to(torch.int8) - 8
    keys, values = codes * scales.unsqueeze(-1)
    if kv.dtype == torch.uint8:
        values = values @ (turn.signs.to(values.dtype) / turn.size)
    return turn.back(keys), values


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
