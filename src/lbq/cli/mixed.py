"""How commands print a choice of bits: the frontier it was taken from, and what each kind of layer got."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from lbq.cli.display import pattern, plain, size, table
from lbq.cli.quality import positions_line

if TYPE_CHECKING:
    from lbq.formats.quality import FrontierPoint, Quality

SHOWN = 0.5  # bits a weight between the points that are shown


def print_frontier(quality: Quality) -> None:
    """A few points of a report's frontier, and the one that was taken."""
    points = quality.frontier
    bits = sorted({bits for point in points for bits in point.bits}, reverse=True)
    rows = []
    for point in _shown(points):
        counts = Counter(point.bits)
        measured = "" if point.measured_kl is None else f"{point.measured_kl.mean:.5f}"
        rows.append(
            (
                f"{point.bits_per_weight:.2f}",
                size(point.nbytes),
                f"{point.predicted_kl:.5f}",
                measured,
                *(str(counts[b]) for b in bits),
            )
        )
    columns = ("bits a weight", "codes and scales", "sum of KL", "measured", *(f"units at {b}" for b in bits))
    table("Least sum of the units' divergences at a size", columns, rows)
    if quality.sensitivity_text is not None:
        click.echo(plain(f"Each unit alone: {positions_line(quality.sensitivity_text)}"))


def print_choice(quality: Quality) -> None:
    """The bits of the point that was taken and measured, by kind of layer."""
    chosen = next(point for point in quality.frontier if point.measured_kl is not None)
    units = list(dict.fromkeys(found.modules for found in quality.sensitivity))
    kinds: dict[str, Counter[int]] = {}
    for modules, bits in zip(units, chosen.bits, strict=True):
        kinds.setdefault(_kind(modules), Counter())[bits] += 1
    every = sorted(set(chosen.bits), reverse=True)
    rows = [(kind, *(str(counts[bits] or "") for bits in every)) for kind, counts in kinds.items()]
    table("Chosen", ("units", *(f"INT{bits}" for bits in every)), rows)


def _shown(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The first, the last, the measured one, and those next to round numbers of bits."""
    shown = {points[0].nbytes: points[0], points[-1].nbytes: points[-1]}
    for a, b in pairwise(points):
        if a.bits_per_weight // SHOWN < b.bits_per_weight // SHOWN:  # a is the best that is below the number
            shown[a.nbytes] = a
    shown |= {point.nbytes: point for point in points if point.measured_kl is not None}
    return [shown[nbytes] for nbytes in sorted(shown)]


def _kind(modules: Sequence[str]) -> str:
    """``model.layers.*.self_attn.{q_proj,k_proj,v_proj}``"""
    first = pattern(modules[0])
    if len(modules) == 1:
        return first
    return f"{first.rpartition('.')[0]}.{{{','.join(module.rpartition('.')[2] for module in modules)}}}"
