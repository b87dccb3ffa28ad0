"""The page's maps: kinds of linear layers down, layers across, a colour for what each has."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lbq.formats.report import ModuleReport
from lbq.page.axes import Axis, layers
from lbq.page.numbers import cosine, percent
from lbq.page.parts import Cell, Empty, Parts

STEPS = 8  # colours of the error map, in the style sheet
_KEPT = "kept"  # style of what stays BF16
_GAP, _GAP_PER_LAYER = 0.08, 0.0025  # of a cell, to its right and below; narrow beside the wide cells of few layers


@dataclass(frozen=True)
class Tile:
    """An SVG path in a field of one unit a cell, its class in the style sheet, and what it says when pointed at."""

    path: str
    style: str
    title: str


@dataclass(frozen=True)
class Swatch:
    """A colour of the legend."""

    style: str
    text: str


@dataclass(frozen=True)
class Map:
    """Rows of tiles. A ``scale`` is a legend whose texts are the lower ends of its colours; ``top`` is the last's."""

    label: str
    x: Axis
    rows: tuple[str, ...]
    tiles: tuple[Tile, ...]
    scale: tuple[Swatch, ...] = ()
    top: str = ""
    legend: tuple[Swatch, ...] = ()


def errors(parts: Parts) -> Map | None:
    """The relative error of every linear layer, each colour for as many; None where nothing is quantised.

    Equal shares show the differences among layers of 4 bits where others have 8, and in spite of one that is far off.
    """
    found = [(row, i, module) for row, kind in enumerate(parts.kinds) for i, module in kind.quantized()]
    if not found:
        return None
    edges = _edges([module.relative_error for _, _, module in found])
    texts = _texts(edges)
    tiles = [Tile(_tile(parts, row, i, 1), f"e{_step(edges, m.relative_error)}", _title(m)) for row, i, m in found]
    kept = [tile for tile in _runs(parts) if tile.style == _KEPT]
    return Map(
        label="Relative error of every linear layer",
        x=layers(parts.layers),
        rows=tuple(kind.label for kind in parts.kinds),
        tiles=(*tiles, *kept),
        scale=tuple(Swatch(f"e{i}", text) for i, text in enumerate(texts[:-1])),
        top=texts[-1],
        legend=(Swatch(_KEPT, Empty.KEPT.value),) if kept else (),
    )


def storage(parts: Parts) -> Map | None:
    """The bits of every linear layer; None where all have the same."""
    tiles = _runs(parts)
    styles = sorted({tile.style for tile in tiles})
    if len(styles) < 2:
        return None
    return Map(
        label="Bits of every linear layer",
        x=layers(parts.layers),
        rows=tuple(kind.label for kind in parts.kinds),
        tiles=tuple(tiles),
        legend=tuple(Swatch(style, Empty.KEPT.value if style == _KEPT else f"INT{style[1:]}") for style in styles),
    )


def scheme_name(bits: int, group: int | None) -> str:
    """``INT4 g64``, ``INT8 row``"""
    return f"INT{bits} {f'g{group}' if group else 'row'}"


def stored(module: ModuleReport) -> str:
    """:func:`scheme_name` of a module."""
    return scheme_name(module.bits, None if module.group == module.k else module.group)


def _title(module: ModuleReport) -> str:
    return f"{module.name}: error {percent(module.relative_error)}, cosine {cosine(module.cosine)}, {stored(module)}"


def _edges(values: Sequence[float]) -> tuple[float, ...]:
    """The borders of at most STEPS classes that hold equally many, ends included."""
    ranked, last = sorted(values), len(values) - 1
    borders = dict.fromkeys(ranked[round(i * last / STEPS)] for i in range(STEPS + 1))
    return tuple(borders) if len(borders) > 1 else (ranked[0], ranked[0])


def _texts(edges: tuple[float, ...]) -> tuple[str, ...]:
    """Borders in the least digits that tell them apart."""
    for digits in (2, 3, 4):
        texts = tuple(percent(edge, digits) for edge in edges)
        if len(set(texts)) == len(texts):
            break
    return texts


def _step(edges: tuple[float, ...], value: float) -> int:
    return min(max(bisect_right(edges, value) - 1, 0), len(edges) - 2)


def _runs(parts: Parts) -> list[Tile]:
    """One tile for neighbours in a row that are stored alike."""
    tiles = []
    for row, kind in enumerate(parts.kinds):
        start = 0
        for (what, style), cells in groupby(kind.cells, _stored_as):
            count = len(list(cells))
            where = f"layer {start}" if count == 1 else f"layers {start} to {start + count - 1}"
            if what != Empty.ABSENT.value:
                tiles.append(Tile(_tile(parts, row, start, count), style, f"{kind.label}, {where}: {what}"))
            start += count
    return tiles


def _stored_as(cell: Cell) -> tuple[str, str]:
    """What a cell says, and its style."""
    return (stored(cell), f"f{cell.bits}") if isinstance(cell, ModuleReport) else (cell.value, _KEPT)


def _tile(parts: Parts, row: int, column: int, columns: int) -> str:
    width = f"{columns - min(_GAP, _GAP_PER_LAYER * parts.layers):g}"
    return f"M{column} {row}h{width}v{1 - _GAP:g}h-{width}z"
