"""How commands print which kernels serve a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from lbq.cli.display import plain

if TYPE_CHECKING:
    from lbq.runtime.binding import KernelUse
    from lbq.runtime.explain import Explanation
    from lbq.runtime.kernels.linear import Matrix


def print_uses(uses: Iterable[KernelUse]) -> None:
    """A line on stderr for each kind of unit and its kernel; a fallback is said."""
    counts: Counter[tuple[str, str, str | None]] = Counter()
    for use in uses:
        counts[use.units, use.kernel, use.fallback] += use.count
    for (units, kernel, fallback), count in counts.items():
        slow = f"  FALLBACK: {fallback}" if fallback else ""
        click.echo(f"[{count:4} × {units}: {kernel}{slow}]", err=True)


def print_explanation(found: Explanation, *, err: bool) -> None:
    """Every unit with its ways, from one token to many."""
    lines = [f"Kernels on {found.device}", f"a token    {found.step}", f"attention  {found.attention}"]
    for each in found.units:
        use = each.use
        lines.append(f"{use.count:4} × {use.units}: {_stored(use.matrix)}")
        if use.fallback:
            lines.append(f"       FALLBACK: {use.fallback}")
        width = max(len(way.tokens) for way in each.ways)
        lines += [f"       {way.tokens:{width}}  {way.how}: {way.why}" for way in each.ways]
    for line in lines:
        click.echo(plain(line), err=err)


def _stored(matrix: Matrix) -> str:
    kind = {16: "BF16", 32: "float32"}.get(matrix.bits)
    if kind is None:
        kind = f"INT{matrix.bits} {'row' if matrix.group == matrix.k else f'g{matrix.group}'}"
    return f"{matrix.n}×{matrix.k} {kind}" + (", bias" if matrix.bias else "")
