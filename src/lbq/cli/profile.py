"""``lbq profile``"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import note, plain, print_json, size, table
from lbq.cli.subject import (
    check_place,
    find_subject,
    fused_option,
    kv_cache_option,
    seconds,
    shape_option,
    stepping,
)
from lbq.formats.errors import UsageError
from lbq.formats.wording import rate

if TYPE_CHECKING:
    from lbq.runtime.bench.profile import Line
    from lbq.runtime.bench.steps import Profiled

COLUMNS = ("launch", "kernel", "count", "each", "a step", "of the step", "bytes", "share of copy", "idle before")


@click.command()
@click.argument("artifact", required=False)
@shape_option
@click.option("--bits", help="With --shape: 3, 4 or 8.  [4]")
@click.option("--gs", "groups", help="With --shape: 32…512 or row.  [256; row at 8 bits]")
@click.option(
    "--depth", type=click.IntRange(1), help="Tokens held before the step.  [256, or what the model was made for]"
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="The median of so many.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@kv_cache_option
@fused_option
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="Write a Chrome trace, FILE.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def profile(
    artifact: str | None,
    shape: str | None,
    bits: str | None,
    groups: str | None,
    depth: int | None,
    steps: int,
    device: Any,
    kv_cache: Any,
    fused: bool | None,
    threads: int | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Show where the time of one decode step of ARTIFACT, or of random weights of a --shape, goes.

    On a GPU the kernels of its CUDA graph, as CUPTI sees them; on a CPU the linear layers and attention. A share is of
    the copy bandwidth of the same run; idle is time in which nothing of the table ran.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler speaks on stderr otherwise; read at its import
    from lbq.runtime.bench.steps import profile_variant
    from lbq.runtime.devices import find_device, set_threads

    if trace is not None and trace.suffix != ".json":
        raise UsageError(f"{trace}: the trace is JSON: name it FILE.json")
    check_place(trace)
    if threads is not None:
        set_threads(threads)
    where = stepping(find_device(device, exact=False, kv_cache=kv_cache), fused)
    if where.note is not None:
        note(where.note)
    with ExitStack() as stack:
        subject = find_subject(artifact, shape, bits, groups, stack)
        if len(subject.variants) != 1:
            raise UsageError("one width and one group at a time")
        found = profile_variant(subject.name, subject.variants[0], where, depth, steps, trace)
    if as_json:
        print_json(found)
        return
    _print(found)
    if trace is not None:
        click.echo(f"{trace}: open it in https://ui.perfetto.dev or chrome://tracing")


def _print(found: Profiled) -> None:
    on, step = found.machine, found.profile
    table(f"{found.subject}, {found.weights}: one step at depth {found.depth}", COLUMNS, [
        _cells(line, step.seconds, on.copy) for line in step.lines
    ])  # fmt: skip
    click.echo()
    nbytes = sum(line.nbytes for line in step.lines)
    busy = sum(line.seconds for line in step.lines)
    lines = [
        f"{on.name}, {on.detail}, torch {on.torch}; memory copied at {rate(on.copy)}, read and written",
        f"a step of {seconds(step.seconds)}, the median of {step.steps}: {seconds(busy)} busy, "
        f"{seconds(max(0.0, step.seconds - busy))} idle; {size(nbytes)} in {seconds(nbytes / on.copy)} at the copy's "
        f"rate: {nbytes / on.copy / step.seconds:.1%}",
    ]
    if found.cache_fallback is not None:
        lines.append(f"FALLBACK keys and values: {found.cache_fallback}")
    for line in (*lines, *((step.note,) if step.note else ())):
        click.echo(plain(line))


def _cells(line: Line, step: float, copy: float) -> tuple[str, ...]:
    return (
        line.label or "(before the step)",
        line.kernel[:60],
        str(line.count),
        seconds(line.seconds / line.count),
        seconds(line.seconds),
        f"{line.seconds / step:.1%}",
        size(line.nbytes) if line.nbytes else "",
        f"{line.nbytes / copy / line.seconds:.1%}" if line.nbytes and line.seconds else "",
        seconds(line.idle),
    )
