"""What a fused step launches, ready on its buffers: the products of a layer, and its attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lbq.runtime.cache import KVCache
from lbq.runtime.fused.plan import KINDS, Batching, Projecting, Role
from lbq.runtime.kernels import attention, batch, planes
from lbq.runtime.kernels.attention import Cache, Heads, Norms, Scratch, Short, Split
from lbq.runtime.kernels.gemv import ArrangedWeight
from lbq.runtime.kernels.planes import Activations, Normed
from lbq.runtime.kernels.project import Activation, project


@dataclass(frozen=True)
class Product:
    """One projection, ready to launch."""

    weight: ArrangedWeight
    bias: torch.Tensor | None
    role: Role
    how: Projecting
    x: Activations
    y: torch.Tensor
    to: Normed | Activations | None = None
    counters: torch.Tensor | None = None
    activation: Activation = "silu"
    following: ArrangedWeight | None = None  # of the projection after this one

    @property
    def apart(self) -> bool:
        """Whether its planes are written by a launch of their own."""
        return self.how.apart and self.to is not None

    def launch(self, *, pdl: bool) -> None:
        """The product, and where they are written apart its planes."""
        project(
            self.x,
            self.weight,
            self.bias,
            self.y,
            kind=KINDS[self.role],
            tile=self.how.tile,
            to=None if self.apart else self.to,
            counters=self.counters,
            activation=self.activation,
            pdl=pdl,
            onward=self.how.onward,
            ahead=self.how.ahead,
            early=self.how.early,
            following=self.following,
            lines=self.how.lines,
        )
        if self.apart and isinstance(self.to, Normed):
            planes.norm(self.y, self.to, pdl=pdl, onward=self.how.onward)
        elif self.apart and isinstance(self.to, Activations):
            planes.plain(self.y, self.to, pdl=pdl, onward=self.how.onward)


@dataclass(frozen=True)
class BatchProduct:
    """One projection of several texts, ready to launch."""

    weight: ArrangedWeight
    bias: torch.Tensor | None
    role: Role
    how: Batching
    x: Activations
    y: torch.Tensor
    to: Normed | Activations | None = None
    counters: torch.Tensor | None = None
    activation: Activation = "silu"

    @property
    def apart(self) -> bool:
        """Its planes are always written by its programs."""
        return False

    def launch(self, *, pdl: bool) -> None:
        batch.product(
            self.x,
            self.weight,
            self.bias,
            self.y,
            kind=KINDS[self.role],
            tile=self.how.tile,
            to=self.to,
            counters=self.counters,
            activation=self.activation,
            pdl=pdl,
            onward=self.how.onward,
        )


@dataclass(frozen=True)
class Cut:
    """How long caches are cut, and what the parts are left in."""

    split: Split
    scratch: Scratch


@dataclass(frozen=True)
class Attending:
    """The attention of one layer, ready to launch on any cache."""

    qkv: torch.Tensor
    heads: Heads
    q_norm: Norms | None
    k_norm: Norms | None
    angles: tuple[torch.Tensor, torch.Tensor]
    cuts: Mapping[int, Cut]  # by the bits of a cache
    short: tuple[Short, Scratch] | None  # None: this way cannot serve these heads
    to: Activations
    whole: torch.Tensor | None = None  # float32 [texts, heads · dim], where a head is no whole blocks of ``to``

    def launch(self, position: torch.Tensor, cache: KVCache, *, pdl: bool, short: bool = False) -> None:
        """``short``: the way made for short texts, where there is one; none reads int8."""
        to = self.to if self.whole is None else self.whole
        held = Cache(cache.kv, cache.scales, cache.turn)
        text = (self.qkv, self.heads, self.q_norm, self.k_norm, self.angles, position, held)
        if short and self.short is not None and cache.scales is None:
            how, scratch = self.short
            attention.attend_short(*text, scratch, how, to, pdl=pdl)
        else:
            cut = self.cuts[held.bits]
            attention.attend(*text, cut.scratch, cut.split, to, pdl=pdl)
        if self.whole is not None:
            planes.plain(self.whole, self.to, pdl=pdl)


@dataclass(frozen=True)
class StepLayer:
    """The five launches of one layer."""

    qkv: Product | BatchProduct
    attention: Attending
    out: Product | BatchProduct
    gate_up: Product | BatchProduct
    down: Product | BatchProduct
