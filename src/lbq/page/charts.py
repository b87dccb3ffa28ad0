"""The page's line charts, as numbers: lines and marks between two axes. The template turns them into SVG.

Lines are paths in a square of 1000 by 1000 that the page stretches to the width it has; marks and labels are placed in
shares of it, so that circles stay round and text keeps its size from a phone to a sheet of paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lbq.formats.quality import Divergence, Estimate, FrontierPoint, Quality
from lbq.page.axes import Axis, layers, linear, logarithmic
from lbq.page.numbers import cosine, number, with_error
from lbq.page.parts import Kind, Parts, Unit

_SQUARE = 1000
_ZERO = 1e-12  # nats: below it is rounding


@dataclass(frozen=True)
class Line:
    """An SVG path in the square, and its class in the style sheet."""

    path: str
    style: str


@dataclass(frozen=True)
class Mark:
    """A point in shares of width and height from the top left, with the ends of its error bar."""

    x: float
    y: float
    style: str
    title: str
    bar: tuple[float, float] | None = None
    text: str = ""


@dataclass(frozen=True)
class Plot:
    """A chart. ``heading`` and ``note`` stand above a panel among others."""

    label: str  # for who cannot see it
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    heading: str = ""
    note: str = ""


@dataclass(frozen=True)
class Alone:
    """What quantising one fused unit alone does."""

    unit: Unit
    bits: int
    kl: Estimate
    stored: bool  # in the artifact, in these bits


def frontier(quality: Quality, bits_per_weight: float) -> Plot:
    """KL divergence against bits a weight: predicted line, measured points, and the artifact itself."""
    points = sorted(quality.frontier, key=lambda point: point.bits_per_weight)
    own = quality.scores.kl
    x = linear(*_ends([bits_per_weight, *(point.bits_per_weight for point in points)]), 6)
    itself = Estimate(own.mean, own.standard_error)
    measured = [(point, point.measured_kl) for point in points if point.measured_kl not in (None, itself)]
    y = _log_axis([own.mean, *(kl.mean for _, kl in measured if kl), *(point.predicted_kl for point in points)])
    line = _path([(x.at(point.bits_per_weight), y.at(point.predicted_kl)) for point in points])
    marks = [_measured(point, kl, x, y) for point, kl in measured if kl]
    title = f"This artifact: {number(bits_per_weight)} bits,"
    mine = _mark("own", x.at(bits_per_weight), y, own, title)
    text = f"{number(bits_per_weight)} bits, KL {with_error(own)[0]}"
    marks.append(replace(mine, text=text))
    return Plot("KL divergence against bits per weight", x, y, (Line(line, "predicted"),), tuple(marks))


def _measured(point: FrontierPoint, kl: Estimate, x: Axis, y: Axis) -> Mark:
    title = f"{number(point.bits_per_weight)} bits, predicted KL {number(point.predicted_kl)}, measured"
    return _mark("measured", x.at(point.bits_per_weight), y, kl, title)


def _mark(style: str, x: float, y: Axis, kl: Estimate | Divergence, title: str) -> Mark:
    mean, error = with_error(kl)
    bar = None
    if kl.standard_error:
        bar = (1 - y.at(kl.mean + kl.standard_error), 1 - y.at(kl.mean - kl.standard_error))
    return Mark(x, 1 - y.at(kl.mean), style, f"{title} KL {mean}" + (f" ± {error}" if error else ""), bar)


def sensitivity(found: Sequence[Alone], count: int) -> tuple[Plot, ...]:
    """A panel for every kind of fused unit in ``count`` layers: a line for each number of bits, dots where stored."""
    inside = [each for each in found if each.unit.layer is not None]
    x, y = layers(count), _log_axis([each.kl.mean for each in inside])

    def panel(label: str) -> Plot:
        lines = []
        of_label = [each for each in inside if each.unit.label == label]
        for bits in sorted({each.bits for each in of_label}):
            of_bits = [each for each in of_label if each.bits == bits]
            at = {each.unit.layer: (x.at(each.unit.layer or 0), y.at(each.kl.mean)) for each in of_bits}
            lines.append(Line(_path([at.get(i) for i in range(count)]), f"b{bits}"))
            lines.append(Line(_dots(at[each.unit.layer] for each in of_bits if each.stored), f"dots b{bits}"))
        return Plot(f"KL divergence of {label} alone, by layer", x, y, tuple(lines), heading=label)

    return tuple(panel(label) for label in dict.fromkeys(each.unit.label for each in inside))


def cosines(parts: Parts) -> tuple[Plot, ...]:
    """For every kind of linear layer the weights' cosine, layer by layer."""
    kinds = [kind for kind in parts.kinds if any(kind.quantized())]
    values = [module.cosine for kind in kinds for _, module in kind.quantized()]
    if not values:
        return ()
    x, y = layers(parts.layers, 5), linear(*_ends(values), 4)
    return tuple(_cosine_panel(kind, x, y, parts.mixed) for kind in kinds)


def _cosine_panel(kind: Kind, x: Axis, y: Axis, mixed: bool) -> Plot:
    """A line, or dots in the colours of their bits where a line would jump between them."""
    at = {i: (x.at(i), y.at(module.cosine)) for i, module in kind.quantized()}
    lines = [Line(_path([at.get(i) for i in range(len(kind.cells))]), "one")]
    if mixed:
        of_bits: dict[int, list[tuple[float, float]]] = {}
        for i, module in kind.quantized():
            of_bits.setdefault(module.bits, []).append(at[i])
        lines = [Line(_dots(points), f"dots b{bits}") for bits, points in sorted(of_bits.items())]
    least, layer = min((module.cosine, i) for i, module in kind.quantized())
    note = f"least {cosine(least)}, layer {layer}"
    return Plot(f"Weight cosine of {kind.label} by layer", x, y, tuple(lines), heading=kind.label, note=note)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _log_axis(values: Sequence[float]) -> Axis:
    positive = [value for value in values if value > _ZERO]
    return logarithmic(*_ends(positive)) if positive else logarithmic(1e-3, 1.0)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """A line through shares (x, y), broken at None; a point alone becomes a dot."""
    commands, previous = [], None
    for i, point in enumerate(points):
        if point is not None:
            alone = previous is None and (i + 1 == len(points) or points[i + 1] is None)
            commands.append(f"{'M' if previous is None else 'L'}{_place(point)}{'h0' if alone else ''}")
        previous = point
    return "".join(commands)


def _dots(points: Iterable[tuple[float, float]]) -> str:
    return "".join(f"M{_place(point)}h0" for point in points)


def _place(point: tuple[float, float]) -> str:
    return f"{round(_SQUARE * point[0])} {round(_SQUARE * (1 - point[1]))}"
