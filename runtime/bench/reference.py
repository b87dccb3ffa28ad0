"""What a decode should have given: the same weights dequantised by torch, a layer at a time, products in float32.

Nothing of a device's own kernels is in it, so that a kernel that is fast and wrong cannot agree with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from lbq.formats.packing import PackedWeight
from lbq.runtime.binding import Binder, Weights
from lbq.runtime.cache import PACKED, DecoderState, KVCache
from lbq.runtime.kernels.cpu.mapped import MappedLinear, by_tiles
from lbq.runtime.kernels.linear import Linear
from lbq.runtime.step import HostStep

SCORES: Final = 1 << 24  # of attention that are held at a time for each head
MOST_KL: Final = 1e-2  # of one position; the bounds of the kernels' own tests are 1e-4 to 1e-3 on average
MOST_LOSS: Final = 0.1  # nats


@dataclass(frozen=True)
class Check:
    """How a decode compares with the reference on the same tokens.

    ``kl``: divergence of the final logits from the reference's, in nats. ``largest``: of their differences. ``loss``:
    by how many nats the reference prefers its own most probable token to the one that was chosen, at worst over all new
    tokens; None where they were drawn. ``repeats``: whether every round gave the same tokens.
    """

    kl: float
    largest: float
    loss: float | None
    repeats: bool

    @property
    def fault(self) -> str | None:
        """What is wrong, in words; None if nothing is."""
        if not self.kl <= MOST_KL:  # NaN too
            return f"its final logits diverge from a plain reference by {self.kl:.1e} nats (at most {MOST_KL:g})"
        if self.loss is not None and not self.loss <= MOST_LOSS:
            return f"it chose a token that a plain reference finds {self.loss:.1e} nats less probable than another"
        if not self.repeats:
            return "the same decode gave other tokens in another round"
        return None


def check(
    logits: torch.Tensor, new: Sequence[int], expected: torch.Tensor, *, repeats: bool, greedy: bool = True
) -> Check:
    """``expected``: the reference's logits [T + 1, V] before each of T ``new`` tokens, and behind the last, where
    ``logits`` [V] were found."""
    wanted, found = (row.double().log_softmax(0) for row in (expected[-1], logits.to(expected.device)))
    before = expected[:-1]
    chosen = before.gather(1, torch.tensor(list(new), device=before.device).unsqueeze(1)).squeeze(1)
    return Check(
        kl=float((wanted.exp() * (wanted - found)).sum().clamp_min(0)),
        largest=float((expected[-1] - logits.to(expected.device)).abs().max()),
        loss=float((before.amax(1) - chosen).max()) if greedy else None,
        repeats=repeats,
    )


def worst(checks: Sequence[Check]) -> Check:
    """What is the worst of several texts."""
    losses = [check.loss for check in checks if check.loss is not None]
    return Check(
        kl=_most([check.kl for check in checks]),
        largest=_most([check.largest for check in checks]),
        loss=_most(losses) if losses else None,
        repeats=all(check.repeats for check in checks),
    )


def _most(values: Sequence[float]) -> float:
    """The largest; NaN where one is."""
    return float(torch.tensor(values, dtype=torch.float64).max())


@torch.inference_mode()
def reference_logits(
    weights: Weights, device: torch.device, ids: Sequence[int], last: int, held: DecoderState | None = None
) -> torch.Tensor:
    """Logits after each of the ``last`` last of ``ids``, float32 [last, V].

    ``held``: a state whose first ``held.length`` keys and values come before ``ids``; it is left as it is. Where it
    keeps them in few bits the reference does, too: what that costs a real model would hide what a wrong kernel does.
    """
    binder, depth = Binder(weights, PlainKernels(device)), 0 if held is None else held.length
    tokens = torch.tensor(list(ids), device=device)
    x = functional.embedding(tokens, binder.embedding().to(device)).to(torch.float32)
    for i in range(len(weights.spec.layers)):
        layer = binder.layer(i)
        source = None if held is None else held.layers[i]
        kept = source.kv.dtype if isinstance(source, KVCache) else torch.float32
        dtype = kept if kept in PACKED else torch.float32
        state = layer.mixer.new_state(depth + len(tokens), dtype=dtype, device=device, fixed=True)
        if source is not None:
            _copy(source, state, depth)
        for start, stop in _parts(len(tokens), depth):
            layer(x[start:stop], state, HostStep(depth + start, stop - start, device))
        binder.release_layer(i)
    norm, head = binder.norm(), binder.head()
    return head(norm(x[-last:]))


def _parts(tokens: int, depth: int) -> Iterator[tuple[int, int]]:
    """Tokens [start, stop) at a time, so that scores stay few."""
    size = max(1, min(512, SCORES // (depth + tokens)))
    for start in range(0, tokens, size):
        yield start, min(tokens, start + size)


def _copy(source: object, target: object, length: int) -> None:
    assert isinstance(source, KVCache)
    assert isinstance(target, KVCache)
    if target.scales is not None and source.scales is not None:
        target.turn = source.turn
        target.kv[:, :, :length], target.scales[:, :, :length] = source.kv[:, :, :length], source.scales[:, :, :length]
    else:
        target.kv[:, :, :length] = torch.stack(source.held(0, length))


@dataclass(frozen=True)
class PlainKernels:
    """:class:`lbq.runtime.binding.Kernels` by torch alone: tiles dequantised to float32, then a float32 matmul."""

    device: torch.device

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        return MappedLinear(weight.to(self.device), self._bias(bias), None)

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return _PlainDense(weight.to(self.device), self._bias(bias))

    def _bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else bias.to(self.device)


class _PlainDense:
    kernel = "float32 tiles"
    fallback: str | None = None
    resident_bytes = 0

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, K] → float32 [M, N]."""
        return by_tiles(x, self._weight.shape[0], lambda a, b: self._weight[a:b].float(), self._bias)
