"""How each launch of a fused step is shaped: a rule, and room for what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lbq.runtime.fused.tables import Table
from lbq.runtime.kernels.attention import Heads, Short, Split, serves_short, split_for
from lbq.runtime.kernels.batch import BatchTile, tile_for
from lbq.runtime.kernels.gemv import ArrangedWeight, Tile, tile
from lbq.runtime.kernels.gemv.tiles import codes_a_column, whole_rows
from lbq.runtime.kernels.project import Kind

Role = Literal["qkv", "out", "gate_up", "down", "head"]
KINDS: dict[Role, Kind] = {"out": "add", "down": "add", "gate_up": "gated", "qkv": "store", "head": "store"}
ROLES: tuple[Role, ...] = ("qkv", "out", "gate_up", "down", "head")


@dataclass(frozen=True)
class Projecting:
    """How one projection runs.

    Its result's int8 planes are written by programs that own whole blocks of 32 outputs, by the last to arrive of those
    that share a block (``tile`` says which of the two), or ``apart``, by a launch of their own.
    """

    tile: Tile
    apart: bool = False
    ahead: bool = False  # with PDL: call all weights of a program into L2 while it waits
    early: int = 1  # steps along K, 1 or 2, whose weights are in registers before the first product
    lines: int = 0  # with PDL: of 128 bytes, of each row of the next projection, called into L2 while it waits
    onward: bool = False  # with PDL: let the next launch's programs start at once, see ``kernels.arrivals``

    def outputs(self, role: Role) -> int:
        """Outputs of a program."""
        return self.tile.owned // 2 if role == "gate_up" else self.tile.owned


@dataclass(frozen=True)
class Batching:
    """How one projection of several texts runs."""

    tile: BatchTile
    onward: bool = True


@dataclass(frozen=True)
class Plan:
    """What was chosen; what is None follows the table, and where that says nothing the rule."""

    qkv: Projecting | None = None
    out: Projecting | None = None
    gate_up: Projecting | None = None
    down: Projecting | None = None
    head: Projecting | None = None
    split: Split | None = None
    eight: Split | None = None  # of int8 caches
    four: Split | None = None  # of those of 4 bits
    short: Short | None = None
    several: BatchTile | None = None  # of all projections of several texts
    pdl: bool = False  # programmatic dependent launch, sm_90 on
    table: Table | None = None  # what was measured on this GPU

    def projecting(self, role: Role, weight: ArrangedWeight, sm_count: int) -> Projecting:
        """How ``role`` runs on ``weight``."""
        chosen: Projecting | None = getattr(self, role)
        if chosen is not None:
            return chosen
        measured = self.table.projection(role, weight) if self.table else None
        if measured is not None:
            return Projecting(
                measured.tile, measured.apart, measured.ahead, measured.early, measured.lines, measured.onward
            )
        return _rule(role, weight, sm_count)

    def splitting(self, heads: Heads, sm_count: int, dtype: torch.dtype = torch.float16, texts: int = 1) -> Split:
        """How attention of ``heads`` cuts a cache of ``dtype``; of several texts into fewer parts each, though one may
        be long."""
        name = {torch.int8: "eight", torch.uint8: "four"}.get(dtype, "split")
        measured = self.table.heads(heads) if self.table else None
        found: Split | None = getattr(self, name) or getattr(measured, name, None)
        chosen = found or split_for(heads, sm_count, dtype)
        return replace(chosen, splits=max(1, chosen.splits // texts))

    def batching(self, role: Role, weight: ArrangedWeight, sm_count: int, texts: int) -> Batching:
        """How ``role`` runs on ``weight`` for several texts."""
        return Batching(self.several or tile_for(weight, texts, sm_count), onward=role != "head")

    def shortening(self, heads: Heads, texts: int = 1) -> Short | None:
        """How ``heads`` attend to short texts; None where they cannot."""
        measured = self.table.heads(heads) if self.table and texts == 1 else None
        short = self.short or (measured.short if measured else _short(heads, texts))
        return short if serves_short(heads) and short.fits(heads) else None

    def knows(self, role: Role, weight: ArrangedWeight) -> bool:
        """Whether the table has this very shape."""
        measured = self.table.projection(role, weight) if self.table else None
        return measured is not None and (measured.n, measured.k, measured.group) == (weight.n, weight.k, weight.group)

    def origin(self, role: Role, weight: ArrangedWeight) -> str | None:
        """Where the choice for ``role`` comes from, in words; None where it is the rule's."""
        if getattr(self, role) is not None:
            return "chosen"
        measured = self.table.projection(role, weight) if self.table else None
        if self.table is None or measured is None:
            return None
        shape = "" if self.knows(role, weight) else f", at {measured.n}×{measured.k}"
        return f"measured on {self.table.gpu}{shape}"

    def with_role(self, role: Role, projecting: Projecting) -> Plan:
        """The same with another choice for one role."""
        changed: dict[str, Any] = {role: projecting}
        return replace(self, **changed)


def _short(heads: Heads, texts: int) -> Short:
    """What was good on an H200 at 256 to 2,048 tokens; several texts keep a GPU busy by fewer parts. A thread has no
    registers for more than 32 tokens of heads wider than 128."""
    block = 64 if texts < 4 and heads.dim <= 128 else 32
    return Short() if texts == 1 else Short(until=4096, block=block, warps=2, parts=8)


def _rule(role: Role, weight: ArrangedWeight, sm_count: int) -> Projecting:
    """What was good for most shapes on an H200, cut to rows that are shorter; the tile of the bare product where they
    are very short. Only the output projection calls its weights ahead: attention before it leaves the memory idle.
    Where much is to be read the next launch is let in at once; else it would only be in the way.
    """
    onward = weight.nbytes > 4 << 20
    columns = -(-weight.k // codes_a_column(weight.bits))
    if columns <= 64:
        chosen = tile(weight.n, weight.k, weight.bits, sm_count)
        return Projecting(
            replace(chosen, rows=max(2, chosen.rows)) if role == "gate_up" else chosen,
            ahead=role == "out",
            onward=onward,
        )
    whole = whole_rows(weight.k, weight.bits, 2, 2, {3: 1, 4: 2, 8: 4}[weight.bits]) if role == "qkv" else None
    if whole is not None:
        return Projecting(whole, onward=onward)
    if role == "out" or (role == "gate_up" and weight.bits < 8):  # programs that own whole blocks of 32 outputs
        return Projecting(Tile(64 if role == "gate_up" else 32, 128, 8), ahead=role == "out", onward=onward)
    warps = 2 if role == "head" else 4
    while warps > 1 and 64 * warps >= columns:
        warps //= 2
    return Projecting(Tile(8 if role == "gate_up" else 4, 128 * warps, warps), onward=onward)
