"""A model's linear layers as a table: kinds (q, k, v, o, gate, up, down) by layers, and what stands outside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from lbq.formats.report import ModuleReport, Report
from lbq.formats.spec import ModelSpec

_LONGEST = 16  # characters of a label; names come from files


class Empty(Enum):
    """A place of the table without a quantised layer."""

    KEPT = "stays BF16"
    ABSENT = "this layer has none"


Cell = ModuleReport | Empty


@dataclass(frozen=True)
class Kind:
    """One row of the table: what layer 0, 1, … have of it."""

    label: str
    cells: tuple[Cell, ...]

    def quantized(self) -> Iterator[tuple[int, ModuleReport]]:
        """Layers' numbers and what they have."""
        return ((i, cell) for i, cell in enumerate(self.cells) if isinstance(cell, ModuleReport))


@dataclass(frozen=True)
class Unit:
    """A fused unit's place: its layer (None outside of them) and the labels of its parts, ``gate, up``."""

    layer: int | None
    label: str


@dataclass(frozen=True)
class Parts:
    """The table, the layers outside of it, and every fused unit by the names of its modules."""

    layers: int
    kinds: tuple[Kind, ...]
    others: tuple[ModuleReport, ...]  # of the head
    units: dict[tuple[str, ...], Unit]

    @property
    def mixed(self) -> bool:
        """Whether quantised layers in the table differ in their bits."""
        return len({module.bits for kind in self.kinds for _, module in kind.quantized()}) > 1

    @property
    def gutter(self) -> int:
        """Characters of the longest label."""
        return max(len(kind.label) for kind in self.kinds)


def parts_of(spec: ModelSpec, report: Report) -> Parts:
    """Sort a report's modules into the layers of ``spec``."""
    found = {module.name: module for module in report.modules}
    count = len(spec.layers)
    templates = [[p for unit in spec.layer(i).units() for p in unit] for i in range(count)]
    label = _labels(p.name for layer in templates for p in layer)
    rows: dict[str, list[Cell]] = {name: [Empty.ABSENT] * count for name in label}
    for i, layer in enumerate(templates):
        for p in layer:
            rows[p.name][i] = found.pop(p.at(i).name, Empty.KEPT)
    units = {
        tuple(p.at(i).name for p in unit): Unit(i, ", ".join(label[p.name] for p in unit))
        for i in range(count)
        for unit in spec.layer(i).units()
    }
    units[(spec.head.name,)] = Unit(None, _short(spec.head.name))
    kinds = tuple(Kind(label[name], tuple(cells)) for name, cells in rows.items())
    return Parts(count, kinds, tuple(found.values()), units)


def _labels(names: Iterable[str]) -> dict[str, str]:
    """Every name with its label, in order: the last component, and the one before where that is not enough."""
    distinct = tuple(dict.fromkeys(names))
    last = [name.rpartition(".")[2] for name in distinct]
    return {name: _short(name, 1 if last.count(end) == 1 else 2) for name, end in zip(distinct, last, strict=True)}


def _short(name: str, components: int = 1) -> str:
    label = ".".join(name.split(".")[-components:]).removesuffix("_proj")
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…"
