"""``lbq pull``: artifacts from the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from lbq.cli.display import note, print_json
from lbq.formats.disk import readable


@click.command()
@click.argument("artifact", metavar="OWNER/NAME[@REVISION]")
@click.option("--out", type=click.Path(path_type=Path), help="A folder of its own.  [the Hub's standard cache]")
@click.option("--overwrite", is_flag=True, help="Replace an artifact at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pull(artifact: str, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Fetch an artifact from the Hub and check every file; what is there and whole is not fetched again."""
    from lbq.hub.pull import pull as fetch

    folder = fetch(artifact, out, overwrite=overwrite, on_note=note)
    if as_json:
        print_json({"path": readable(folder)})
    else:
        click.echo(folder)
