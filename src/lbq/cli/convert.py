"""``lbq convert``"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from lbq.cli.display import Size, blocks, note, plain, print_json, progress, size, steps, table
from lbq.cli.mixed import print_choice, print_frontier
from lbq.cli.options import Method, Wish, method_options, quantization_options, readers_option
from lbq.cli.plan import show
from lbq.cli.quality import score_rows, text_line
from lbq.formats.disk import readable
from lbq.formats.errors import UsageError

if TYPE_CHECKING:  # the quantizer loads when a conversion runs, not for `lbq run`
    from lbq.evaluation.report import Measurement, ReportRequest
    from lbq.evaluation.study import Study
    from lbq.formats.quality import Quality
    from lbq.quantizer.convert import Conversion, Prepared

REPORT_HELP = (
    "weights: their errors; kl: also what became of the model's next tokens, measured on a text; "
    "full: also what each layer's part in it is.  [weights; full with --target-bpw]"
)
TARGET_HELP = "Instead of --bits: the bits of each layer that cost the least at this many bits a weight, measured."
SENSITIVITY_HELP = "Do not measure layers again: take them from this artifact's report, which must be full."


@click.command()
@click.argument("model")
@quantization_options()
@click.option("--target-bpw", type=float, metavar="BITS", help=TARGET_HELP)
@click.option("--sensitivity", type=click.Path(path_type=Path), metavar="ARTIFACT", help=SENSITIVITY_HELP)
@readers_option
@method_options()
@click.option("--out", type=click.Path(path_type=Path), help="The artifact's folder.  [./NAME-int4-g256]")
@click.option("--report", type=click.Choice(["weights", "kl", "full"]), help=REPORT_HELP)
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text for --report kl and full.  [English prose]")
@click.option("--report-tokens", type=int, help="The most tokens of that text.  [4096]")
@click.option("--max-shard-size", "max_shard_bytes", type=Size(), default="5GB", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dry-run", is_flag=True, help="Say what would be written, from headers alone.")
@click.option("--strict", is_flag=True, help="Fail where anything would differ from what was asked for.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    model: str,
    wish: Wish,
    target_bpw: float | None,
    sensitivity: Path | None,
    readers: tuple[str, ...],
    method: Method,
    out: Path | None,
    report: Literal["weights", "kl", "full"] | None,
    text: Path | None,
    report_tokens: int | None,
    max_shard_bytes: int,
    device: Literal["auto", "cpu", "cuda"],
    dry_run: bool,
    strict: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL, a folder or a Hub id, into an artifact that lbq runs and that transformers loads.

    A PATTERN names a layer by whole components of its name, as a shell glob: down_proj, layers.0, layers.[0-3].mlp.
    """
    from lbq.evaluation.report import ReportRequest
    from lbq.quantizer.convert import check_output, fetched, prepare, unfinished
    from lbq.quantizer.source import resolve

    report = report or ("weights" if target_bpw is None else "full")
    tuning = method.tuning(studied=report == "full" and sensitivity is None)
    _check_target(target_bpw is not None, wish, sensitivity, report, dry_run)
    measured = ReportRequest(report, text, report_tokens)
    request = wish.request(
        readers=readers,
        max_shard_bytes=max_shard_bytes,
        strict=strict,
        tuning=tuning,
    )
    if out is not None and not dry_run:
        check_output(model, out, overwrite=overwrite)
    source = resolve(model, wish.revision, note, weights=False)
    prepared = prepare(source, request)
    target = out or Path(prepared.default_name(target_bpw))
    for line in prepared.plan.notes:
        note(line)
    measurement = study = None
    if not dry_run:
        check_output(model, target, overwrite=overwrite)
        prepared = fetched(prepared)
    if measured.kind != "weights" and (target_bpw is not None or not dry_run):
        measurement = _measurement(measured, prepared, device)
        if measured.kind == "full":
            study = _study(prepared, measurement, target_bpw, sensitivity or method.calib)
            prepared = study.prepared
    if dry_run:
        from lbq.planning import forecast

        show(forecast(prepared, target, device), as_json)
        return
    try:
        done = _write(prepared, measurement, study, target, overwrite=overwrite, restart=method.restart, device=device)
    except (KeyboardInterrupt, SystemExit):
        if tuning is not None and unfinished(target):
            click.echo("lbq: finished blocks are kept; the same command goes on with them", err=True)
        raise
    _print_result(done, model, as_json)


def _check_target(targeted: bool, wish: Wish, sensitivity: Path | None, report: str, dry_run: bool) -> None:
    """Raise UsageError for options that do not go together."""
    if targeted and wish.bits is not None:
        raise UsageError("--bits and --target-bpw: give one of them")
    if targeted and report != "full":
        raise UsageError(f"--report {report}: --target-bpw measures all that a full report has; leave --report out")
    if sensitivity is not None and report != "full":
        raise UsageError("--sensitivity is for --target-bpw and --report full")
    if targeted and dry_run and sensitivity is None:
        raise UsageError("--dry-run reads headers, and --target-bpw measures weights; give --sensitivity ARTIFACT too")


def _measurement(request: ReportRequest, prepared: Prepared, device: Literal["auto", "cpu", "cuda"]) -> Measurement:
    from lbq.evaluation.report import Measurement

    measurement = Measurement(request, prepared, device)
    if measurement.device.note:
        note(measurement.device.note)
    return measurement


def _study(prepared: Prepared, measurement: Measurement, target_bpw: float | None, source: Path | str | None) -> Study:
    """What units do alone, and the bits chosen from it; ``source`` is an artifact's Path, or a text by its name."""
    from lbq.evaluation.mixed import freedom
    from lbq.evaluation.study import UnitMeasurement, saved

    free = freedom(prepared)
    if target_bpw is not None:
        free.check(target_bpw)
    if isinstance(source, Path):
        study = saved(free, source)
    else:
        units = UnitMeasurement(free, measurement.device, source)
        with steps("Measuring layers") as advance:
            study = units.measure(advance)
    return study if target_bpw is None else study.choose(target_bpw)


def _write(
    prepared: Prepared,
    measurement: Measurement | None,
    study: Study | None,
    target: Path,
    *,
    overwrite: bool,
    restart: bool,
    device: Literal["auto", "cpu", "cuda"],
) -> Conversion:
    """Convert, and measure: with one bar after the other."""
    from lbq.page import render
    from lbq.quantizer.convert import write_artifact

    with ExitStack() as bars:
        tuned = bars.enter_context(blocks())
        bar = bars.enter_context(progress("Converting", len(prepared.plan.steps), prepared.source_bytes))

        def measure(folder: Path) -> Quality:
            assert measurement is not None
            bars.close()
            with steps("Measuring") as advance:
                quality = measurement.measure(folder, advance)
            return quality if study is None else study.added_to(quality)

        return write_artifact(
            prepared,
            target,
            overwrite=overwrite,
            device=device,
            restart=restart,
            measure=measure if measurement else None,
            page=render if measurement else None,
            on_progress=bar.advance,
            on_tuned=tuned,
        )


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
