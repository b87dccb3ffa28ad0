"""``lbq plan``, and what ``lbq convert --dry-run`` prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import note, print_json, size, table
from lbq.cli.options import Method, Wish, method_options, quantization_options, readers_option

if TYPE_CHECKING:
    from lbq.formats.readers import Fit
    from lbq.planning import Forecast, Memory
    from lbq.quantizer.timing import Timing


@click.command()
@click.argument("model")
@quantization_options()
@readers_option
@method_options()
@click.option("--out", type=click.Path(path_type=Path), help="Where the artifact would be.  [./NAME-int4-g128]")
@click.option("--context", type=int, help="Tokens of the longest text to be run.  [8192, or the model's]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Whose kernels to name; it need not be here.",
)
@click.option("--strict", is_flag=True, help="Fail where anything would differ from what was asked for.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def plan(
    model: str,
    wish: Wish,
    readers: tuple[str, ...],
    method: Method,
    out: Path | None,
    context: int | None,
    device: Any,
    strict: bool,
    as_json: bool,
) -> None:
    """Say what quantizing MODEL, a folder or a Hub id, would give and take, from its headers alone: size, memory, disk,
    time, and the kernel that each layer gets here, in vLLM and in SGLang."""
    from lbq.conversion import decide, make_order
    from lbq.planning import forecast

    order = make_order(**wish.scheme(), **asdict(method), readers=readers, strict=strict)
    job = decide(model, order, out, revision=wish.revision, dry_run=True, on_note=note)
    show(forecast(job.prepared, job.target, device, context), as_json)


def show(found: Forecast, as_json: bool) -> None:
    """Print a forecast."""
    if as_json:
        print_json(found)
        return
    _show_tensors(found)
    click.echo()
    _show_kernels(found)
    click.echo()
    click.echo(
        f"size      {size(found.bytes)}, {found.bits_per_weight:.2f} bits a quantized weight, "
        f"from {size(found.source_bytes)}"
    )
    click.echo(
        f"converts  with {size(found.peak_bytes)} of memory on top of Python's and {size(found.disk_bytes)} of disk "
        f"({size(found.disk_free)} free), {_time(found.timing)}"
    )
    if found.cache_free is not None:
        click.echo(
            f"fetches   {size(found.remote_bytes)} from the Hub into the cache ({size(found.cache_free)} free), "
            f"or with --stream two files at a time, of at most {size(found.largest_remote)}"
        )
    click.echo(f"runs      with texts of up to {found.cpu.context} tokens, on a CPU in {_memory(found.cpu)}")
    click.echo(f"          on a GPU in {_memory(found.gpu)}{_free(found.gpu)}")


def _show_tensors(found: Forecast) -> None:
    table(
        f"{found.path} (not written)",
        ("tensors", "shape", "becomes", "group", "count", "size"),
        [
            (
                row.names,
                "×".join(map(str, row.shape)),
                row.becomes,
                "" if row.becomes == "BF16" else _group(row.group),
                str(row.count),
                size(row.bytes),
            )
            for row in found.tensors
        ],
    )


def _show_kernels(found: Forecast) -> None:
    from lbq.formats.readers import VERSIONS

    lbq = "lbq on " + ("a GPU" if found.device == "cuda" else "a CPU")
    vllm, sglang = (f"{tool} {version}" for tool, version in VERSIONS.items())
    click.echo("Kernels")
    for layer in found.layers:
        stored = (
            "BF16"
            if layer.bits == 16
            else f"INT{layer.bits}, " + (f"group {layer.group}" if layer.group else "one scale a row")
        )
        click.echo(f"{layer.count:4} × {layer.units}: {layer.n}×{layer.k} {stored}")
        click.echo(f"       {lbq}: {layer.kernel}" + (f"  FALLBACK: {layer.fallback}" if layer.fallback else ""))
        if layer.vllm and layer.sglang:
            click.echo(f"       {vllm}: {_fit(layer.vllm)}; {sglang}: {_fit(layer.sglang)}")


def _group(group: int | None) -> str:
    return "row" if group is None else str(group)


def _fit(fit: Fit) -> str:
    return f"{fit.text} (slow)" if fit.runs and not fit.fast else fit.text


def _time(timing: Timing | None) -> str:
    if timing is None:
        return "its time not estimated"
    known = {"quantizing": timing.quantizing, "reading": timing.reading, "writing": timing.writing}
    parts = ", ".join(f"{what} {_seconds(seconds)}" for what, seconds in known.items() if seconds is not None)
    return f"in about {_seconds(timing.seconds)} here ({parts})"


def _seconds(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``"""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory(memory: Memory) -> str:
    spare = f", activations {size(memory.spare)}" if memory.spare else ""
    return f"{size(memory.nbytes)}: weights {size(memory.weights)}, keys and values {size(memory.cache)}{spare}"


def _free(memory: Memory) -> str:
    if memory.free is None:
        return ""
    return f" ({size(memory.free)} free" + (": too little)" if memory.free < memory.nbytes else ")")
