"""``lbq bench``"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import markdown, note, plain, print_json, size, table
from lbq.cli.options import number_list
from lbq.cli.subject import check_place, find_subject, rate, seconds, shape_option
from lbq.formats.errors import StorageError, UsageError

if TYPE_CHECKING:
    import torch

    from lbq.cli.subject import Subject
    from lbq.runtime.bench.decode import Decoded, Speed, Workload
    from lbq.runtime.bench.sweep import Machine, Peer, Report, Row

COLUMNS = ("weights", "depth", "bytes a token", "tokens/s", "floor", "share", "first token", "cold", "memory", "KL")

PEER_COLUMNS = ("peer", "bytes a token", "tokens/s", "share", "first token", "lbq is ×")


@click.command()
@click.argument("artifact", required=False)
@shape_option
@click.option("--bits", help="With --shape: which of 3, 4 and 8.  [4]")
@click.option("--gs", "groups", help="With --shape: which groups, 32…512 or row.  [256; row at 8 bits]")
@click.option("--depth", default="0", show_default=True, help="Tokens held before the prompt, as 0,4096.")
@click.option("--batch", default="1", show_default=True, help="Texts at a time.")
@click.option("--prompt", "prompt", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens.")
@click.option("--tokens", "new", type=click.IntRange(2), default=256, show_default=True, help="New tokens.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Beside one to warm up.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Write a roofline, FILE.svg.")
@click.option("--peers", is_flag=True, help="Run other engines at the same shape too: those that are installed.")
@click.option("--gguf", type=click.Path(path_type=Path, dir_okay=False), help="With --peers: what llama-bench reads.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bench(
    artifact: str | None,
    shape: str | None,
    bits: str | None,
    groups: str | None,
    depth: str,
    batch: str,
    prompt: int,
    new: int,
    rounds: int,
    device: Any,
    threads: int | None,
    picture: Path | None,
    peers: bool,
    gguf: Path | None,
    as_markdown: bool,
    as_json: bool,
) -> None:
    """Measure how fast ARTIFACT, a folder or a Hub id, or random weights of a --shape decode here.

    The memory's copy bandwidth is measured in the same run; the share is how much of it the decode of one text reaches.
    The final logits and every token are checked against a plain reference: wrong results end with code 7.
    """
    from lbq.runtime.bench.decode import Workload
    from lbq.runtime.bench.sweep import Report, machine, measure
    from lbq.runtime.devices import device_errors, find_device, set_threads

    if picture is not None and picture.suffix != ".svg":
        raise UsageError(f"{picture}: the picture is an SVG: name it FILE.svg")
    check_place(picture)
    if gguf is not None and not peers:
        raise UsageError("--gguf goes with --peers")
    if gguf is not None and not gguf.is_file():
        raise StorageError(f"{gguf}: no such file")
    depths, batches = (number_list(text, o, "0,4096") for text, o in ((depth, "--depth"), (batch, "--batch")))
    if threads is not None:
        set_threads(threads)
    where = find_device(device, exact=False)
    if where.note is not None:
        note(where.note)
    with ExitStack() as stack:
        subject = find_subject(artifact, shape, bits, groups, stack)
        with device_errors():
            on = machine(where.device)
        load = Workload(prompt, new, rounds)
        rows = measure(subject.variants, on, where, load, depths, batches, _say)
        report = Report(subject.name, on, load, tuple(rows))
        if peers:
            report = replace(report, peers=_peers(subject, load, where.device, gguf))
    if not any(row.decoded for row in report.rows):
        raise UsageError(f"nothing was measured: {report.rows[0].skipped}")
    if as_json:
        print_json(report)
    else:
        _print(report, as_markdown)
    if picture is not None:
        from lbq.formats.disk import storage_errors
        from lbq.page.roofline import draw

        with storage_errors(picture):
            picture.write_text(draw(report), encoding="utf-8")
    report.require_sound()


def _peers(subject: Subject, load: Workload, device: torch.device, gguf: Path | None) -> tuple[Peer, ...]:
    from lbq.peers import run_peers

    return tuple(run_peers(subject.variants[0].spec, load, device, gguf=gguf, on_peer=_say))


def _say(what: str) -> None:
    click.echo(f"measuring {plain(what)} …", err=True)


def _print(report: Report, as_markdown: bool) -> None:
    on, load = report.machine, report.load
    rows = [_cells(row, row.decoded) for row in report.rows if row.decoded is not None]
    end = "  " if as_markdown else ""  # two spaces end a line there
    show = markdown if as_markdown else table
    show(plain(f"{report.subject} on {on.name}"), COLUMNS, rows)
    click.echo()
    if any(peer.speed for peer in report.peers):
        ours = max(row.decoded.speed.median for row in report.rows if row.decoded is not None)
        show("Peers", PEER_COLUMNS, [_peer(peer, peer.speed, on, ours) for peer in report.peers if peer.speed])
        click.echo()
    lines = [
        f"{on.name}, {on.detail}, torch {on.torch}; memory copied at {rate(on.copy)}, read and written",
        f"one text, a prompt of {load.prompt} and {load.new} new tokens, greedy: median (slowest – fastest) of "
        f"{load.rounds} rounds; cold: the first token of a round before them",
        *dict.fromkeys(f"not run: {row.skipped}" for row in report.rows if row.skipped),
    ]
    lines += [f"{peer.name}: {peer.failure}" for peer in report.peers if peer.failure]
    if (loaded := report.rows[0]).load_seconds:
        lines.append(_loading(loaded, report.machine))
    kernels = dict.fromkeys(use for row in report.rows for use in row.kernels)
    lines += [f"FALLBACK {use.units}: {use.kernel}, because {use.fallback}" for use in kernels if use.fallback]
    if any(row.share is not None and row.share > 1 for row in report.rows):
        lines.append("a share above 100%: these weights come from the processor's cache, not from its memory")
    for line in lines:
        click.echo(plain(line) + end)


def _cells(row: Row, found: Decoded) -> tuple[str, ...]:
    speed = found.speed
    return (
        row.case.weights,
        str(row.case.depth),
        size(row.weight_bytes + found.cache_bytes),
        _speed(speed),
        "" if row.floor is None else _number(row.floor),
        "" if row.share is None else f"{row.share:.1%}",
        seconds(found.first_token_seconds),
        seconds(found.cold_seconds),
        size(found.peak_bytes),
        f"{found.check.kl:.1e}" if row.fault is None else "WRONG",
    )


def _peer(peer: Peer, speed: Speed, on: Machine, ours: float) -> tuple[str, ...]:
    share = "" if peer.nbytes is None else f"{speed.median * peer.nbytes / on.copy:.1%}"
    return (
        " ".join((peer.name, *([peer.version] if peer.version else []))),
        "" if peer.nbytes is None else size(peer.nbytes),
        _speed(speed),
        share,
        "" if peer.first_token_seconds is None else seconds(peer.first_token_seconds),
        f"{ours / speed.median:.2f}",
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
