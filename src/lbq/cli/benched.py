"""How ``lbq bench`` prints what it found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lbq.cli.display import markdown, plain, size, table
from lbq.cli.subject import seconds
from lbq.formats.wording import counted, rate

if TYPE_CHECKING:
    from lbq.runtime.bench.decode import Decoded, Speed
    from lbq.runtime.bench.sweep import Machine, Peer, Report, Row

COLUMNS = ("weights", "depth", "bytes a token", "tokens/s", "floor", "share", "first token", "cold", "memory", "KL")
TEXTS = ("texts", "a text", "step")  # behind the depth and the tokens/s, where there are several
PEER_COLUMNS = ("peer", "bytes a token", "tokens/s", "share", "first token", "lbq is ×")


def print_report(report: Report, as_markdown: bool) -> None:
    """Tables of cases and of peers, then what they were measured by."""
    on = report.machine
    show = markdown if as_markdown else table
    ran = [(row, row.decoded) for row in report.rows if row.decoded is not None]
    several = any(row.case.batch > 1 for row, _ in ran)
    columns = (*COLUMNS[:2], TEXTS[0], *COLUMNS[2:4], *TEXTS[1:], *COLUMNS[4:]) if several else COLUMNS
    show(plain(f"{report.subject} on {on.name}"), columns, [_cells(*each, several=several) for each in ran])
    click.echo()
    if peers := [(peer, peer.speed) for peer in report.peers if peer.speed]:
        sound = [
            found.speed.median for row, found in ran if row.case.depth == 0 and row.case.batch == 1 and not row.fault
        ]
        ours = max(sound, default=None)  # peers hold nothing before the prompt either
        show("Peers", PEER_COLUMNS, [_peer(*each, on, ours) for each in peers])
        click.echo()
    end = "  " if as_markdown else ""  # two spaces end a line there
    for line in _lines(report):
        click.echo(plain(line) + end)


def _lines(report: Report) -> list[str]:
    on, load = report.machine, report.load
    how = "drawn" if load.sampled else "greedy"
    if any(row.fused for row in report.rows):
        how += " by the fused step"
    texts = _texts(report)
    kept = dict.fromkeys(row.decoded.cache_dtype for row in report.rows if row.decoded is not None)
    lines = [
        f"{on.name}, {on.detail}, torch {on.torch}; memory copied at {rate(on.copy)}, read and written",
        f"{texts}, a prompt of {load.prompt} and {load.new} new tokens, {how}, keys and values in {', '.join(kept)}: "
        f"median (slowest – fastest) of {counted(load.rounds, 'round')}; cold: the first token of a round before them",
        *dict.fromkeys(f"not run: {row.skipped}" for row in report.rows if row.skipped),
        *(f"{peer.name}: {peer.failure}" for peer in report.peers if peer.failure),
    ]
    lines += dict.fromkeys(_loading(row, on) for row in report.rows if row.load_seconds)
    kernels = dict.fromkeys(use for row in report.rows for use in row.kernels)
    lines += [f"FALLBACK {use.units}: {use.kernel}, because {use.fallback}" for use in kernels if use.fallback]
    lines += dict.fromkeys(f"FALLBACK of the fused step: {r.step_fallback}" for r in report.rows if r.step_fallback)
    together = [row for row in report.rows if row.decoded and row.decoded.batch_fallback]
    lines += dict.fromkeys(
        f"FALLBACK of several texts, which take turns: {r.decoded.batch_fallback}" for r in together if r.decoded
    )
    lines += dict.fromkeys(f"FALLBACK keys and values: {r.cache_fallback}" for r in report.rows if r.cache_fallback)
    if any(row.share is not None and row.share > 1 for row in report.rows):
        lines.append("a share above 100%: these weights come from the processor's cache, not from its memory")
    return lines


def _cells(row: Row, found: Decoded, *, several: bool) -> tuple[str, ...]:
    speed, texts = found.speed, row.case.batch
    over_one = "" if row.over_one is None else f"{row.over_one:.2f}×"
    return (
        row.case.weights,
        str(row.case.depth),
        *([str(texts)] if several else []),
        size(round(row.token_bytes or 0)),
        _speed(speed),
        *([_number(speed.median / texts), over_one] if several else []),
        "" if row.floor is None else _number(row.floor),
        "" if row.share is None else f"{row.share:.1%}",
        seconds(found.first_token_seconds),
        seconds(found.cold_seconds),
        size(found.peak_bytes),
        f"{found.check.kl:.1e}" if row.fault is None else "WRONG",
    )


def _texts(report: Report) -> str:
    batches = list(dict.fromkeys(row.case.batch for row in report.rows if row.decoded))
    if batches == [1]:
        return "one text"
    return f"{', '.join(map(str, batches))} texts at a time (tokens/s of all; step: its time over one text's)"


def _peer(peer: Peer, speed: Speed, on: Machine, ours: float | None) -> tuple[str, ...]:
    share = "" if peer.nbytes is None else f"{speed.median * peer.nbytes / on.copy:.1%}"
    return (
        " ".join((peer.name, *([peer.version] if peer.version else []))),
        "" if peer.nbytes is None else size(peer.nbytes),
        _speed(speed),
        share,
        "" if peer.first_token_seconds is None else seconds(peer.first_token_seconds),
        "" if ours is None else f"{ours / speed.median:.2f}",
    )


def _loading(row: Row, on: Machine) -> str:
    nbytes, took = row.resident_bytes, row.load_seconds or 0.0
    text = f"loaded {size(nbytes)} in {seconds(took)}, {rate(nbytes / took)}"
    if on.upload is None:
        return text
    return f"{text}: {nbytes / took / on.upload:.0%} of the {rate(on.upload)} from pinned memory to the GPU"


def _speed(speed: Speed) -> str:
    return f"{_number(speed.median)} ({_number(speed.slowest)} – {_number(speed.fastest)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
