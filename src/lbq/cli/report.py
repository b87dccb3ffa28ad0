"""``lbq report``"""

from __future__ import annotations

import os
from pathlib import Path

import click

from lbq.cli.display import note, print_json, size
from lbq.formats.disk import readable


@click.command()
@click.argument("artifact")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="The page."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def report(artifact: str, revision: str | None, out: Path, as_json: bool) -> None:
    """Write the quality report of ARTIFACT, a folder or a Hub id, as one page for a browser, from its manifest and
    report.json; nothing else is fetched.

    Without charts of what no text was read for: see lbq convert --report.
    """
    from lbq.formats.artifact import open_artifact
    from lbq.formats.disk import hash_file, write_file
    from lbq.formats.errors import DataError
    from lbq.formats.manifest import REPORT, read_manifest
    from lbq.formats.report import report_of
    from lbq.hub.artifacts import find_artifact
    from lbq.hub.names import find_model
    from lbq.page import render

    folder = find_artifact(artifact, revision, weights=False, on_note=note)
    if isinstance(find_model(artifact, revision), Path):
        open_artifact(folder).close()
    manifest = read_manifest(folder)
    found = report_of(folder, manifest)
    if hash_file(folder / REPORT) != manifest.files[REPORT]:  # which the page states
        raise DataError(f"{folder / REPORT}: content differs from its sha256; fetch or convert the artifact again")
    page = render(manifest, found)
    write_file(_checked(out), page)
    if as_json:
        print_json({"path": readable(out), "bytes": len(page)})
    else:
        click.echo(f"{out}: {size(len(page))}")


def _checked(out: Path) -> Path:
    """Where ``out`` really is. Raises StorageError where something else stands or an artifact has its files."""
    from lbq.formats.disk import storage_errors
    from lbq.formats.errors import StorageError
    from lbq.formats.manifest import MANIFEST
    from lbq.page import is_page

    real = Path(os.path.realpath(out))
    if not real.parent.is_dir():
        raise StorageError(f"{out}: {real.parent} is not a folder; make it first")
    if (real.parent / MANIFEST).is_file():
        raise StorageError(f"{out}: in the folder of an artifact, whose files are hashed; choose another --out")
    if os.path.lexists(real):
        with storage_errors(out):
            ours = real.is_file() and is_page(real)
        if not ours:
            raise StorageError(f"{out}: exists and is not a page of lbq's; choose another --out")
    return real
