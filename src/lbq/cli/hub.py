"""``lbq pull``, ``lbq push`` and ``lbq card``: artifacts from the Hub and to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lbq.cli.display import note, print_json, progress, size
from lbq.formats.disk import listed, readable

if TYPE_CHECKING:
    from lbq.hub.push import Push


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


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME[@BRANCH]")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--revision", help="The branch, which is made if need be.  [main]")
@click.option("--message", help="The commit's message.")
@click.option("--create-pr", is_flag=True, help="Open a pull request and leave the branch as it is.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push(
    artifact: Path,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    create_pr: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload ARTIFACT and a model card to the Hub, in one commit on top of what is there.

    Every file is checked before. A push that was cut leaves the branch as it was, and the next goes on with what is
    uploaded. Files of an earlier artifact are removed; others are left alone.
    """
    from lbq.hub.push import carry_out, check_files, prepare_push, require_token

    prepared = prepare_push(artifact, repository, revision=revision, private=private, create_pr=create_pr, on_note=note)
    if not dry_run:
        require_token(repository)
    changes, files = prepared.changes, prepared.manifest.files
    if changes.foreign:
        note(f"{changes.hub_id}: not lbq's, and left alone: {listed(list(changes.foreign))}")
    with progress("Verifying", len(files), sum(entry.size for entry in files.values())) as bar:
        check_files(prepared, bar.advance)
    done = None if dry_run or prepared.is_empty else carry_out(prepared, message, note)
    if as_json:
        names = [file.name for file in changes.uploads]
        print_json({"uploads": names, "deleted": changes.deleted, "foreign": changes.foreign, "pushed": done})
    elif done is not None:
        click.echo(done.pull_request or done.url)
    else:
        _print_changes(prepared)


def _print_changes(push: Push) -> None:
    changes = push.changes
    if push.is_empty:
        click.echo(f"{changes.hub_id}: nothing to do, all {len(changes.wanted)} files are there")
    if push.makes:
        click.echo(f"{changes.hub_id}: would be made")
    for file in changes.uploads:
        click.echo(f"upload  {file.name}  {size(file.size)}")
    for name in changes.deleted:
        click.echo(f"delete  {name}")


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("repository", metavar="[OWNER/NAME]", required=False)
def card(artifact: Path, repository: str | None) -> None:
    """Print the model card that lbq push would make for ARTIFACT, on top of its README.md if it has one."""
    from lbq.hub.push import make_card

    click.echo(make_card(artifact, repository or f"owner/{artifact.resolve().name}"), nl=False)
