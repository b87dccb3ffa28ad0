"""``lbq export``"""

from __future__ import annotations

from pathlib import Path

import click

from lbq.cli.display import note, print_json, progress, size
from lbq.formats.disk import readable

TARGETS = ("vllm", "sglang", "gptq", "awq", "auto-round", "gguf")


@click.command()
@click.argument("artifact")
@click.option("--to", type=click.Choice(TARGETS), required=True, help="The tool, or its format.")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.  [./NAME-TO]")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option(
    "--tensor-parallel", "ranks", type=int, default=1, help="GPUs that vllm or sglang share each layer between."
)
@click.option("--strict", is_flag=True, help="Fail where any weight would differ from the artifact's.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact, or a GGUF of its name, at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    artifact: str,
    to: str,
    out: Path | None,
    revision: str | None,
    ranks: int,
    strict: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ARTIFACT, a folder or a Hub id, as a checkpoint that another tool reads.

    vllm and sglang read artifacts as they are; their export has groups that their fast kernels take, and is an artifact
    still; with --tensor-parallel, groups that are whole on every GPU. Codes are never changed; what else differs is
    said.
    """
    from lbq.formats.artifact import open_artifact
    from lbq.formats.staging import check_target
    from lbq.hub.artifacts import find_artifact
    from lbq.quantizer.export import prepare_export, replaceable, write_export

    folder = find_artifact(artifact, revision, on_note=note)
    if out is not None:
        check_target(out, folder, overwrite=overwrite, ours=replaceable(folder, to))
    with open_artifact(folder) as opened:
        prepared = prepare_export(opened, to, ranks=ranks, strict=strict)
        for line in prepared.layers.notes:
            note(line)
        label = artifact.rstrip("/").rpartition("/")[2].partition("@")[0]
        target = out or Path(f"{label}-{to}" if label.strip(".") else prepared.default_name)
        with progress("Exporting", len(prepared.steps), prepared.nbytes) as bar:
            done = write_export(prepared, target, bar.advance, overwrite=overwrite)
    if as_json:
        print_json({"path": readable(done.path), "to": to, "bytes": done.bytes, "notes": done.notes})
    else:
        click.echo(f"{done.path}: {size(done.bytes)}, for {to}")
