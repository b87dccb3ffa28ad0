"""``lbq convert``"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lbq.cli.display import Size, blocks, note, plain, print_json, progress, size, steps, table
from lbq.cli.mixed import print_choice, print_frontier
from lbq.cli.options import Method, Wish, method_options, quantization_options, readers_option
from lbq.cli.plan import show
from lbq.cli.quality import score_rows, text_line
from lbq.formats.disk import readable
from lbq.formats.errors import UsageError

if TYPE_CHECKING:  # the quantizer loads when a conversion runs, not for `lbq run`
    from lbq.conversion import Job
    from lbq.quantizer.convert import Conversion

REPORT_HELP = (
    "weights: their errors; kl: also what became of the model's next tokens, measured on a text; "
    "full: also what each layer's part in it is.  [weights; full with --target-bpw]"
)
TARGET_HELP = "Instead of --bits: the bits of each layer that cost the least at this many bits a weight, measured."
STREAM_HELP = (
    "Of a Hub id: fetch, convert and drop one file after another, or fetch all into the cache.  "
    "[--stream where the cache has no room]"
)
SENSITIVITY_HELP = "Do not measure layers again: take them from this artifact's report, which must be full."


@click.command()
@click.argument("model")
@quantization_options()
@click.option("--target-bpw", type=float, metavar="BITS", help=TARGET_HELP)
@click.option("--sensitivity", type=click.Path(path_type=Path), metavar="ARTIFACT", help=SENSITIVITY_HELP)
@readers_option
@method_options()
@click.option("--out", type=click.Path(path_type=Path), help="The artifact's folder.  [./NAME-int4-g128]")
@click.option("--report", type=click.Choice(["weights", "kl", "full"]), help=REPORT_HELP)
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text for --report kl and full.  [English prose]")
@click.option("--report-tokens", type=int, help="The most tokens of that text.  [4096]")
@click.option("--max-shard-size", "max_shard_bytes", type=Size(), default="5GB", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dry-run", is_flag=True, help="Say what would be written, from headers alone.")
@click.option("--stream/--no-stream", default=None, help=STREAM_HELP)
@click.option("--restart", is_flag=True, help="Drop what an interrupted --method autoround or --stream has finished.")
@click.option("--strict", is_flag=True, help="Fail where anything would differ from what was asked for.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    model: str,
    wish: Wish,
    method: Method,
    out: Path | None,
    device: Literal["auto", "cpu", "cuda"],
    dry_run: bool,
    stream: bool | None,
    restart: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL, a folder or a Hub id, into an artifact that lbq runs and that transformers loads.

    A PATTERN names a layer by whole components of its name, as a shell glob: down_proj, layers.0, layers.[0-3].mlp.
    """
    from lbq.conversion import decide, make_order
    from lbq.quantizer.convert import unfinished
    from lbq.quantizer.work_folder import KEPT

    order = make_order(**wish.scheme(), **asdict(method), **options)
    if dry_run and order.target_bpw is not None and order.sensitivity is None:
        raise UsageError("--dry-run reads headers, and --target-bpw measures weights; give --sensitivity ARTIFACT too")
    job = decide(
        model,
        order,
        out,
        revision=wish.revision,
        device=device,
        overwrite=overwrite,
        dry_run=dry_run,
        stream=stream,
        restart=restart,
        on_note=note,
    )
    with steps("Measuring layers") as advance:
        job = job.studied(advance, note)
    if dry_run:
        from lbq.planning import forecast

        show(forecast(job.prepared, job.target, device), as_json)
        return
    try:
        done = _run(job)
    except (KeyboardInterrupt, SystemExit):
        if unfinished(job.prepared, job.target):
            click.echo(f"lbq: {KEPT}", err=True)
        raise
    _print_result(done, model, as_json)


def _run(job: Job) -> Conversion:
    """With a bar for each part of the work, one after the other."""
    prepared = job.prepared
    with (
        blocks() as tuned,
        progress("Converting", len(prepared.plan.steps), prepared.source_bytes) as bar,
        steps("Measuring") as measured,
    ):
        return job.run(on_tuned=tuned, on_progress=bar.advance, on_fetch=bar.waits, on_measured=measured, on_note=note)


def _print_result(done: Conversion, model: str, as_json: bool) -> None:
    manifest, summary, quality = done.manifest, done.manifest.summary, done.report.quality
    nbytes = sum(entry.size for entry in manifest.files.values())
    if as_json:
        result = {"path": readable(done.path), "bytes": nbytes, "summary": summary, "notes": manifest.notes}
        if quality is not None:
            result["quality"] = quality
        print_json(result)
        return
    worst = sorted(done.report.modules, key=lambda module: module.cosine)[:10]
    table(
        "Least like the original",
        ("layer", "bits", "group", "cosine", "error", "worst row"),
        [
            (
                m.name,
                str(m.bits),
                "row" if m.group == m.k else str(m.group),
                f"{m.cosine:.5f}",
                f"{m.relative_error:.2%}",
                f"{m.worst_row_error:.2%}",
            )
            for m in worst
        ],
    )
    click.echo(
        f"{done.path}: {size(nbytes)}, {summary.bits_per_weight:.2f} bits a quantized weight; "
        f"weight cosine {summary.cosine:.5f}, error {summary.relative_error:.2%}"
    )
    if quality is not None:
        table("Against the original", ("measure", "value"), score_rows(quality.scores))
        click.echo(plain(text_line(quality.text)))
        if quality.frontier:
            print_frontier(quality)
        if manifest.method.target_bpw is not None:
            print_choice(quality)
    if "tokenizer.json" in manifest.files:
        if quality is None:
            click.echo(f"What it cost: lbq eval {done.path} --against {model}")
        click.echo(f"Run it: lbq run {done.path}")
