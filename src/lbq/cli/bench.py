"""``lbq bench``"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.benched import print_report
from lbq.cli.display import note, plain, print_json
from lbq.cli.options import number_list
from lbq.cli.subject import check_place, find_subject, fused_option, kv_cache_option, shape_option, stepping
from lbq.formats.errors import StorageError, UsageError

if TYPE_CHECKING:
    import torch

    from lbq.cli.subject import Subject
    from lbq.runtime.bench.decode import Workload
    from lbq.runtime.bench.sweep import Peer, Report


@click.command()
@click.argument("artifact", required=False)
@shape_option
@click.option("--bits", help="With --shape: which of 3, 4 and 8.  [4]")
@click.option("--gs", "groups", help="With --shape: which groups, 32…512 or row.  [256; row at 8 bits]")
@click.option("--depth", default="0", show_default=True, help="Tokens held before the prompt, as 0,4096.")
@click.option("--batch", default="1", show_default=True, help="Texts at a time, as 1,2,4,8; up to 16.")
@click.option("--prompt", "prompt", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens.")
@click.option("--tokens", "new", type=click.IntRange(2), default=256, show_default=True, help="New tokens.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Beside one to warm up.")
@click.option("--sampled", is_flag=True, help="Draw tokens, temperature 0.7, top-k 20, top-p 0.95.  [greedy]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@kv_cache_option
@fused_option
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Write a roofline, FILE.svg or .png.")
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
    sampled: bool,
    device: Any,
    kv_cache: Any,
    fused: bool | None,
    threads: int | None,
    picture: Path | None,
    peers: bool,
    gguf: Path | None,
    as_markdown: bool,
    as_json: bool,
) -> None:
    """Measure how fast ARTIFACT, a folder or a Hub id, or random weights of a --shape decode here.

    The memory's copy bandwidth is measured in the same run; the share is how much of it decoding reaches.
    The final logits and every token are checked against a plain reference: wrong results end with code 7.
    """
    from lbq.runtime.bench.decode import Workload
    from lbq.runtime.bench.sweep import run
    from lbq.runtime.devices import find_device, set_threads

    _check_files(picture, peers, gguf)
    depths, batches = number_list(depth, "--depth", "0,4096"), number_list(batch, "--batch", "1,2,4")
    if peers and (sampled or 0 not in depths or 1 not in batches):
        raise UsageError(
            "--peers decode one text greedily, with nothing before the prompt: no --sampled, 0 in --depth, 1 in --batch"
        )
    if threads is not None:
        set_threads(threads)
    where = stepping(find_device(device, exact=False, kv_cache=kv_cache), fused)
    if where.note is not None:
        note(where.note)
    load = Workload(prompt, new, rounds, sampled)
    with ExitStack() as stack:
        subject = find_subject(artifact, shape, bits, groups, stack)
        report, error = run(subject.name, subject.variants, where, load, depths, batches, _say)
    measured = any(row.decoded for row in report.rows)
    if error is None and peers and measured:
        found, error = _peers(subject, load, where.device, gguf)
        report = replace(report, peers=found)
    if measured:
        try:
            print_json(report) if as_json else print_report(report, as_markdown)
        finally:  # whether or not somebody reads the table
            if picture is not None:
                _draw(report, picture)
    elif error is None:
        raise UsageError(f"nothing was measured: {report.rows[0].skipped}")
    if error is not None:
        raise error
    report.require_sound()


def _check_files(picture: Path | None, peers: bool, gguf: Path | None) -> None:
    """What can be refused before anything is measured."""
    if picture is not None and picture.suffix not in (".svg", ".png"):
        raise UsageError(f"{picture}: the picture is an SVG or a PNG: name it FILE.svg or FILE.png")
    if picture is not None and picture.suffix == ".png" and find_spec("resvg_py") is None:
        raise UsageError(f"{picture}: a PNG needs the package resvg_py: pip install resvg_py, or name it FILE.svg")
    check_place(picture)
    if gguf is not None and not peers:
        raise UsageError("--gguf goes with --peers")
    if gguf is not None and not gguf.is_file():
        raise StorageError(f"{gguf}: no such file")


def _draw(report: Report, picture: Path) -> None:
    from lbq.formats.disk import write_file
    from lbq.page.roofline import WIDTH, draw

    svg = draw(report)
    if picture.suffix == ".svg":
        write_file(picture, svg.encode())
        return
    from resvg_py import svg_to_bytes

    write_file(picture, bytes(svg_to_bytes(svg_string=svg, width=2 * WIDTH)))


def _peers(
    subject: Subject, load: Workload, device: torch.device, gguf: Path | None
) -> tuple[tuple[Peer, ...], KeyboardInterrupt | None]:
    """Those that ran, and what ended it."""
    from lbq.peers import run_peers

    found: list[Peer] = []
    try:
        found.extend(run_peers(subject.variants[0].spec, load, device, gguf=gguf, on_peer=_say))
    except KeyboardInterrupt as raised:
        return tuple(found), raised
    return tuple(found), None


def _say(what: str) -> None:
    click.echo(f"measuring {plain(what)} …", err=True)
