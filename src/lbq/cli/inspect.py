"""``lbq inspect``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lbq.cli.display import note, pattern, plain, print_json, size, table
from lbq.cli.quality import perplexities, text_line, with_error
from lbq.formats.errors import UsageError

if TYPE_CHECKING:
    from lbq.formats.manifest import Calibration, Manifest
    from lbq.formats.quality import Quality


@click.command()
@click.argument("artifact")
@click.option("--layers", is_flag=True, help="Every layer on a line of its own.")
@click.option("--kernels", is_flag=True, help="Which kernel, tile and path each layer gets, and why.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="With --kernels: whose; it need not be here.  [auto]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest; with --kernels, these.")
def inspect(artifact: str, layers: bool, kernels: bool, device: Any, as_json: bool) -> None:
    """Show what ARTIFACT is, how it was made and what it cost.

    Of a folder the headers are read; of a Hub id (owner/name@revision) the manifest and the report are fetched.
    """
    from lbq.formats import json_file
    from lbq.formats.manifest import read_manifest
    from lbq.formats.report import report_of
    from lbq.hub.artifacts import find_artifact

    if device is not None and not kernels:
        raise UsageError("--device goes with --kernels")
    if layers and kernels:
        raise UsageError("--layers and --kernels: one of them at a time")
    folder = find_artifact(artifact, weights=False, on_note=note)
    manifest = _checked_manifest(folder) if Path(artifact).is_dir() else read_manifest(folder)
    if kernels:
        _print_kernels(manifest, device or "auto", as_json)
        return
    if as_json:
        click.echo(json_file.encode(manifest), nl=False)
        return
    report = report_of(folder, manifest)
    _print_head(artifact, manifest)
    if report.quality is not None:
        _print_quality(report.quality)
    click.echo()
    _print_tensors(manifest, {module.name: module.cosine for module in report.modules}, layers)
    for text in manifest.notes:
        note(text)


def _print_kernels(manifest: Manifest, device: Any, as_json: bool) -> None:
    from lbq.cli.kernels import print_explanation
    from lbq.runtime.devices import device_or_absent
    from lbq.runtime.explain import explain
    from lbq.runtime.needs import needs

    where = device_or_absent(device)
    found = explain(manifest.spec, needs(manifest.spec, manifest.quantized, where).units, where)
    if as_json:
        print_json(found)
    else:
        print_explanation(found, err=False)


def _checked_manifest(folder: Path) -> Manifest:
    from lbq.formats.artifact import open_artifact

    with open_artifact(folder) as opened:
        return opened.manifest


def _print_head(artifact: str, manifest: Manifest) -> None:
    from lbq.formats.manifest import AutoRound, Import

    spec, method, source, summary = manifest.spec, manifest.method, manifest.source, manifest.summary
    revision = f" at {source.revision}" if source.revision else ""
    nbytes = sum(entry.size for entry in manifest.files.values())
    tools = plain(", ".join(f"{name} {version}" for name, version in manifest.tools.items()))
    group = method.group or "row"
    click.echo(f"{artifact}: {size(nbytes)} in {len(manifest.files)} files, format {manifest.lbq_format}")
    click.echo(
        f"model    {len(spec.layers)} layers, hidden {spec.hidden_size}, vocabulary {spec.vocab_size}, "
        f"context {spec.context}"
    )
    click.echo(f"source   {plain(source.name + revision)}")
    bits = f"INT{method.bits}" if method.bits else f"at most {method.target_bpw:g} bits a weight"
    head = f", head {method.lm_head} bits" if method.lm_head else ""
    name = f"import of {plain(method.origin)}" if isinstance(method, Import) else method.name
    click.echo(f"method   {name}, {bits}, group {group}{head}, by {tools}")
    if isinstance(method, AutoRound):
        click.echo(f"tuned    {method.iterations} iterations a block{_text(method.calibration)}")
    click.echo(
        f"quality  weight cosine {summary.cosine:.5f} (worst layer {summary.worst_cosine:.5f}), "
        f"error {summary.relative_error:.2%}, {summary.bits_per_weight:.2f} bits a quantized weight"
    )


def _text(calibration: Calibration | None) -> str:
    if calibration is None:
        return ""
    return f", on {calibration.samples} samples of {calibration.tokens} tokens of {plain(calibration.name)}"


def _print_quality(quality: Quality) -> None:
    scores = quality.scores
    click.echo(
        f"         KL divergence {with_error(scores.kl, '{:.5f}')}, same top-1 token "
        f"{with_error(scores.same_top1, '{:.2%}')}, perplexity {perplexities(scores)}"
    )
    click.echo(plain(f"         {text_line(quality.text)}"))


def _print_tensors(manifest: Manifest, cosines: dict[str, float], layers: bool) -> None:
    rows: dict[tuple[str, ...], list[float]] = {}
    for name, entry in manifest.quantized.items():
        group = "row" if entry.group == entry.k else str(entry.group)
        key = (name if layers else pattern(name), f"{entry.n}×{entry.k}", f"INT{entry.bits}", group)
        rows.setdefault(key, []).append(cosines[name])
    shown = [(*key, str(len(found)), f"{min(found):.5f}") for key, found in rows.items()]
    dense: dict[tuple[str, ...], int] = {}
    for name, tensor in manifest.dense.items():
        place = (name if layers else pattern(name), "×".join(map(str, tensor.shape)))
        dense[place] = dense.get(place, 0) + 1
    shown += [(*place, "BF16", "", str(count), "") for place, count in dense.items()]
    table("", ("tensors", "shape", "stored as", "group", "count", "worst cosine"), shown)
