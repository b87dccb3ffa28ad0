"""The roofline of ``lbq bench`` as one SVG: tokens a second over bytes a token, below what memory lets through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from lbq.formats.wording import rate, size
from lbq.page.axes import Axis, logarithmic
from lbq.page.numbers import number
from lbq.runtime.bench.sweep import Report

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 76, 250, 56, 52  # margins; labels of points stand in the right one too
LINE = 15  # between labels

STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-size: 15px; font-weight: 600 }
.axis { stroke: #999 } .grid { stroke: #ddd } .roof { stroke: #b3261e; stroke-width: 2 }
.part { stroke: #b3261e; stroke-dasharray: 4 4; opacity: .6 } .lbq { fill: #1a5fb4 } .wrong { fill: #b3261e }
.peer { fill: #888 }
.lead { stroke: #999; stroke-width: .5 } .back { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .grid { stroke: #444 } .back { fill: #1b1b1b }
.lbq { fill: #78aeed } .roof, .part { stroke: #ff8a80 } .wrong { fill: #ff8a80 } }"""


@dataclass(frozen=True)
class Point:
    """A case that ran."""

    x: float  # bytes a token
    y: float  # tokens a second
    label: str
    style: str


def draw(report: Report) -> str:
    """An SVG document. At least one case must have run."""
    ran = [row for row in report.rows if row.decoded is not None]
    assert ran
    points = [
        Point(
            row.token_bytes or 0.0,
            row.decoded.speed.median,
            f"{row.case.weights.split(',')[0]}{f' at {row.case.depth}' if row.case.depth else ''}"
            f"{f' × {row.case.batch}' if row.case.batch > 1 else ''}: "
            f"{'WRONG' if row.fault else f'{row.share or 0:.0%}'}",
            "wrong" if row.fault else "lbq",
        )
        for row in ran
        if row.decoded is not None
    ]
    for peer in report.peers:
        if peer.speed is not None and peer.nbytes is not None:
            share = peer.speed.median * peer.nbytes / report.machine.copy
            points.append(Point(peer.nbytes, peer.speed.median, f"{peer.name}: {share:.0%}", "peer"))
    load = report.load
    texts = "one text" if all(row.case.batch == 1 for row in ran) else "one text, or × so many at a time"
    return roofline(
        f"{report.subject} on {report.machine.name}",
        f"{texts}, {load.prompt} + {load.new} tokens",
        report.machine.copy,
        points,
    )


def roofline(title: str, how: str, copy: float, points: Sequence[Point]) -> str:
    """An SVG document of ``points``, at least one, below ``copy`` bytes a second. ``how`` they were measured."""
    nbytes = [point.x for point in points]
    x = logarithmic(min(nbytes) / 1.3, max(nbytes) * 1.3)
    y = logarithmic(min([copy / x.high / 4, *(point.y for point in points)]), copy / x.low)
    plot = _Plot(x, y)
    title = f"{title}: tokens/s over bytes a token"
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>',
            f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
            f'<text x="{LEFT}" y="42">{escape(how)}; copy bandwidth {rate(copy)}, measured in the same run</text>',
            *plot.frame(),
            *plot.roofs(copy),
            *plot.points(points),
            "</svg>\n",
        )
    )


@dataclass(frozen=True)
class _Plot:
    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels."""
        return (
            round(LEFT + self.x.at(x) * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - self.y.at(y) * (HEIGHT - TOP - BOTTOM), 1),
        )

    def frame(self) -> Iterator[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for value in self.x.values:
            at, _ = self.at(value, self.y.low)
            name = size(value).replace(".0 ", " ")
            yield f'<path class="grid" d="M{at} {TOP}V{bottom}"/>'
            yield f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{name}</text>'
        for value in self.y.values:
            _, at = self.at(self.x.low, value)
            yield f'<path class="grid" d="M{LEFT} {at}H{right}"/>'
            yield f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{number(value)}</text>'
        yield f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
        middle = (LEFT + right) / 2
        yield f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">bytes a token, weights and keys</text>'

    def roofs(self, copy: float) -> Iterator[str]:
        """All, a half and a quarter of what memory lets through."""
        for part, style, name in ((1.0, "roof", "100%"), (0.5, "part", "50%"), (0.25, "part", "25%")):
            low = max(self.x.low, part * copy / self.y.high)
            high = min(self.x.high, part * copy / self.y.low)
            (x0, y0), (x1, y1) = self.at(low, part * copy / low), self.at(high, part * copy / high)
            yield f'<path class="{style}" d="M{x0} {y0}L{x1} {y1}"/>'
            yield f'<text x="{x0 + 6}" y="{round(y0 + 32, 1)}">{name}</text>'

    def points(self, points: Iterable[Point]) -> Iterator[str]:
        """Dots, and their labels one below the other in the margin where they would cover each other."""
        ordered = sorted(points, key=lambda point: -point.y)
        places = _apart([self.at(point.x, point.y)[1] for point in ordered])
        for point, place in zip(ordered, places, strict=True):
            x, y = self.at(point.x, point.y)
            end = WIDTH - RIGHT + 8
            title = f"{number(point.y, 4)} tokens/s"
            yield f'<path class="lead" d="M{x} {y}L{end - 4} {place}"/>'
            yield f'<circle class="{point.style}" cx="{x}" cy="{y}" r="4.5"><title>{title}</title></circle>'
            yield f'<text x="{end}" y="{place + 4}">{escape(point.label)}</text>'


def _apart(wanted: Sequence[float]) -> list[float]:
    """Rising places near the ``wanted`` ones, a line from one another, or less where there are more than fit."""
    line = min(LINE, (HEIGHT - BOTTOM - LINE) / max(1, len(wanted)))
    places: list[float] = []
    for i, place in enumerate(wanted):
        least = places[-1] + line if places else LINE
        most = HEIGHT - BOTTOM - line * (len(wanted) - 1 - i)
        places.append(round(min(max(place, least), most), 1))
    return places
