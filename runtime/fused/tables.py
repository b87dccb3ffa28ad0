"""What was measured to be fastest: tiles and splits for the shapes of models, one JSON file per GPU in ``measured/``.

``lbq.runtime.bench.table`` makes such files. A GPU without one is served by that of a GPU with the same chip, one of
equal compute capability and as many multiprocessors; else by the rules of ``plan``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from lbq.formats import json_file
from lbq.runtime.kernels.attention import Heads, Short, Split
from lbq.runtime.kernels.gemv import ArrangedWeight, Tile
from lbq.runtime.kernels.gemv.tiles import codes_a_column
from lbq.runtime.kernels.gpu import gpu_of

FOLDER = Path(__file__).parent / "measured"
NEAR = 1.0  # doublings of N and K together, up to which a measured shape speaks for another

Count = Annotated[int, Meta(ge=1)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a table."""


class Measured(Part, frozen=True):
    """How one projection [n, k] runs fastest within its step: see ``plan.Projecting``."""

    role: str
    n: Count
    k: Count
    bits: Count
    group: Count
    rows: Count
    columns: Count
    warps: Count
    apart: bool
    ahead: bool
    early: Count = 1
    rounds: Count = 1
    lines: Annotated[int, Meta(ge=0)] = 0
    onward: bool = False

    @property
    def tile(self) -> Tile:
        return Tile(self.rows, self.columns, self.warps, self.rounds)

    def distance(self, weight: ArrangedWeight) -> float:
        """Doublings between the two shapes; infinite where the tile would be out of place."""
        if weight.bits != self.bits:
            return math.inf
        columns = -(-weight.k // codes_a_column(weight.bits))
        if self.columns >= 2 * columns and self.columns > 32:
            return math.inf
        if self.rounds > 1 and self.columns < columns:
            return math.inf
        return abs(math.log2(weight.n / self.n)) + abs(math.log2(weight.k / self.k))


class MeasuredHeads(Part, frozen=True):
    """How heads attend fastest: see ``kernels.attention``."""

    kv_heads: Count
    group: Count
    dim: Count
    split: Split
    short: Short
    eight: Split | None = None  # of int8 caches
    four: Split | None = None  # of those of 4 bits

    def serves(self, heads: Heads) -> bool:
        return (self.kv_heads, self.group, self.dim) == (heads.kv_heads, heads.group, heads.dim)


class Table(Part, frozen=True):
    """What was measured on one GPU."""

    gpu: str  # as torch names it
    capability: tuple[int, int]
    multiprocessors: Count
    made: str  # when, and with which versions
    projections: tuple[Measured, ...] = ()
    attention: tuple[MeasuredHeads, ...] = ()

    def projection(self, role: str, weight: ArrangedWeight) -> Measured | None:
        """The entry for ``weight``, or for the nearest shape that is near enough."""
        same = [entry for entry in self.projections if entry.role == role]
        found = min(same, key=lambda entry: (entry.distance(weight), entry.group != weight.group), default=None)
        return found if found is not None and found.distance(weight) <= NEAR else None

    def heads(self, heads: Heads) -> MeasuredHeads | None:
        return next((entry for entry in self.attention if entry.serves(heads)), None)

    def merged(self, other: Table) -> Table:
        """Both, with what ``other`` says where both speak."""
        return msgspec.structs.replace(
            other,
            projections=_merged(self.projections, other.projections, lambda e: (e.role, e.bits, e.n, e.k, e.group)),
            attention=_merged(self.attention, other.attention, lambda e: (e.kv_heads, e.group, e.dim)),
        )


def _merged(old: Iterable, new: Iterable, key) -> tuple:  # type: ignore[no-untyped-def, type-arg]
    found = {key(entry): entry for entry in (*old, *new)}
    return tuple(found[at] for at in sorted(found))


def path_of(gpu: str) -> Path:
    """Where the table of a GPU is kept."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


@cache
def shipped() -> tuple[Table, ...]:
    """All tables. Raises DataError for a file that is none."""
    return tuple(json_file.read(path, Table) for path in sorted(FOLDER.glob("*.json")))


def table_for(gpu: str, capability: tuple[int, int], multiprocessors: int) -> Table | None:
    """The table of ``gpu``, or of one with the same chip."""
    named = [table for table in shipped() if table.gpu == gpu]
    alike = [t for t in shipped() if (t.capability, t.multiprocessors) == (capability, multiprocessors)]
    return next(iter(named + alike), None)


def device_table(device: torch.device) -> Table | None:
    """The table for a device; None for a CPU, or where nothing was measured on a GPU like it."""
    gpu = gpu_of(device)
    return None if gpu is None else table_for(gpu.name, gpu.capability, gpu.multiprocessors)
