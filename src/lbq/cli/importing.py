"""``lbq import``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lbq.cli.display import Size, note, print_json, progress, size
from lbq.formats.disk import readable

if TYPE_CHECKING:
    from lbq.quantizer.convert import Conversion

REQUANTIZE_HELP = "Where there is no exact image: round scales to BF16, or else round to nearest what codes stand for."


@click.command("import")
@click.argument("checkpoint")
@click.option("--out", type=click.Path(path_type=Path), help="The artifact's folder.  [./NAME-lbq]")
@click.option("--requantize", is_flag=True, help=REQUANTIZE_HELP)
@click.option("--bits", type=int, help="3, 4 or 8: more than the source's hold the same values.  [the source's]")
@click.option("--gs", "group", metavar="GROUP", help="Weights that share a scale: 32…512 or row.  [the source's]")
@click.option("--lm-head", type=int, help="Bits of the output head: 8, 4 or 16.  [as in the source]")
@click.option("--original", help="Of a GGUF file: the model that it was made of, a folder or a Hub id.")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--max-shard-size", "max_shard_bytes", type=Size(), default="5GB", show_default=True)
@click.option("--strict", is_flag=True, help="Fail where anything would differ from the source.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def import_(
    checkpoint: str,
    out: Path | None,
    requantize: bool,
    bits: int | None,
    group: str | None,
    lm_head: int | None,
    original: str | None,
    revision: str | None,
    max_shard_bytes: int,
    strict: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make an artifact of CHECKPOINT, a folder or a Hub id that GPTQ, AWQ, AutoRound, compressed-tensors or MLX wrote,
    or a GGUF file.

    Every weight is the source's, or the reason why it cannot be is said.
    """
    from lbq.quantizer.convert import check_output, write_artifact
    from lbq.quantizer.foreign.importing import (
        ImportRequest,
        default_name,
        find_source,
        open_foreign_only,
        prepare_import,
    )

    request = ImportRequest(bits, group, lm_head, requantize, max_shard_bytes, strict)
    if out is not None:
        check_output(checkpoint, out, overwrite=overwrite)
    source = find_source(checkpoint, original, revision, note)
    target = out or default_name(source)
    check_output(checkpoint, target, overwrite=overwrite)
    with open_foreign_only(source) as foreign:
        prepared = prepare_import(source, foreign, request)
        for line in prepared.plan.notes:
            note(line)
        with progress("Importing", len(prepared.plan.steps), prepared.source_bytes) as bar:
            done = write_artifact(
                prepared, target, overwrite=overwrite, device="cpu", on_progress=bar.advance, on_note=note
            )
    _print_result(done, as_json)


def _print_result(done: Conversion, as_json: bool) -> None:
    from lbq.formats.manifest import Import

    manifest, summary = done.manifest, done.manifest.summary
    method = manifest.method
    assert isinstance(method, Import)
    nbytes = sum(entry.size for entry in manifest.files.values())
    if as_json:
        result = {"path": readable(done.path), "bytes": nbytes, "origin": method.origin}
        print_json({**result, "requantized": method.requantized, "summary": summary, "notes": manifest.notes})
        return
    layers = len(manifest.quantized)
    how = (
        "every weight of them the source's"
        if not method.requantized
        else f"{method.requantized} of them requantized: cosine with the source's {summary.cosine:.5f}, "
        f"error {summary.relative_error:.2%}"
    )
    click.echo(
        f"{done.path}: {size(nbytes)}, {summary.bits_per_weight:.2f} bits a quantized weight; "
        f"{layers} layers of {method.origin}, {how}"
    )
    if "tokenizer.json" in manifest.files:
        click.echo(f"Run it: lbq run {done.path}")
