"""``lbq verify``"""

from __future__ import annotations

from pathlib import Path

import click

from lbq.cli.display import note, print_json, progress, size


@click.command()
@click.argument("artifact")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(artifact: str, as_json: bool) -> None:
    """Compare every file of ARTIFACT with the sizes and hashes in its manifest, then check all headers.

    ARTIFACT is a folder, or a Hub id (owner/name@revision) whose files are fetched.
    """
    from lbq.formats.artifact import open_artifact
    from lbq.formats.artifact import verify as verify_files
    from lbq.formats.disk import readable
    from lbq.formats.errors import DataError
    from lbq.formats.manifest import MANIFEST, read_manifest
    from lbq.hub.artifacts import find_artifact

    folder = find_artifact(artifact, on_note=note)
    manifest = read_manifest(folder)
    files = manifest.files
    total = sum(entry.size for entry in files.values())
    with progress("Verifying", len(files), total) as bar:
        found = list(verify_files(folder, manifest, bar.advance))
    problems = {name: problem for name, problem in found if problem}
    if not problems:  # the manifest itself has no hash: what it says must fit the headers
        try:
            open_artifact(folder).close()
        except DataError as error:
            problems[MANIFEST] = str(error)
    if as_json:
        print_json({"path": readable(artifact), "ok": not problems, "problems": problems})
    if problems:
        listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        mend = (
            "fetch or convert the artifact again" if Path(artifact).is_dir() else f"mend the cache: lbq pull {artifact}"
        )
        raise DataError(f"{artifact}: {listed}; {mend}")
    if not as_json:
        click.echo(f"{artifact}: {len(files)} files, {size(total)}, all as they were written")
