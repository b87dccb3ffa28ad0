"""``lbq push``: an artifact becomes one commit of a repository on the Hub.

Large files are uploaded first, where nobody sees them; then a single commit names them all, on top of the commit that
was looked at before. A push that was cut leaves the branch as it was, and the next one uploads what is still missing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lbq import __version__
from lbq.formats.artifact import open_artifact, verify
from lbq.formats.disk import hash_file
from lbq.formats.errors import DataError, LbqError, RemoteError, UsageError
from lbq.formats.front_matter import parse_card
from lbq.formats.manifest import MANIFEST, Manifest
from lbq.hub.artifacts import OnBytes
from lbq.hub.card import README, card_of, differ_outside, read_card
from lbq.hub.changes import Changes, Upload, find_changes
from lbq.hub.client import (
    LOGIN,
    WAITS,
    OnNote,
    explained,
    hub_errors,
    is_passing,
    new_api,
    quiet,
    root_of,
    status_of,
    told,
)
from lbq.hub.names import MAIN, HubId, parse_hub_id
from lbq.hub.snapshot import Snapshot, online_snapshot

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


@dataclass(frozen=True)
class Push:
    """A push that has been decided and not begun."""

    folder: Path
    manifest: Manifest
    changes: Changes
    private: bool
    create_pr: bool
    makes: Literal["repository", "branch"] | None

    @property
    def is_empty(self) -> bool:
        """Whether the branch is there and as it shall be."""
        return self.makes is None and self.changes.is_empty


@dataclass(frozen=True)
class Pushed:
    """Where the artifact is now. ``pull_request`` is the address of one that waits to be merged."""

    commit: str
    url: str
    pull_request: str | None = None


def make_card(folder: Path, repository: str) -> str:
    """The README.md that a push to a new repository would have. Raises StorageError, DataError and UsageError."""
    hub_id = _place(repository, None)
    with open_artifact(folder) as artifact:
        return card_of(folder, artifact.manifest, hub_id, _own_card(folder))


def prepare_push(
    folder: Path,
    repository: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    on_note: OnNote = quiet,
) -> Push:
    """Look at an artifact and at the repository ``owner/name``, and decide; nothing is changed.

    ``revision`` is a branch, ``private`` the visibility of a repository that is made. Raises StorageError and DataError
    for the folder, RemoteError for the Hub, UsageError for what cannot be: another's weights in the repository, a
    public one where ``private`` was asked for, a pull request to none.
    """
    hub_id = _place(repository, revision)
    with open_artifact(folder) as artifact:
        manifest = artifact.manifest
    remote, makes = _look(hub_id, on_note)
    if create_pr and makes:
        raise UsageError(f"{hub_id}: there is nothing to open a pull request to; leave out --create-pr")
    if private and remote is not None and remote.private is False:
        raise UsageError(f"{hub_id}: the repository is public; make it private on the Hub, or leave out --private")
    wanted = (*_files(folder, manifest), _card(folder, manifest, hub_id, remote, on_note))
    changes = find_changes(wanted, hub_id, remote, on_note)
    return Push(folder, manifest, changes, private, create_pr, makes)


def require_token(name: str) -> None:
    """Raise RemoteError where nobody is logged in."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise RemoteError(f"{name}: no token to push with: {LOGIN}")


def check_files(push: Push, on_bytes: OnBytes | None = None) -> None:
    """Hash every file of the artifact. Raises DataError for those that are not as they were written."""
    found = {name: problem for name, problem in verify(push.folder, push.manifest, on_bytes) if problem}
    if found:
        listed = "; ".join(f"{name}: {problem}" for name, problem in found.items())
        raise DataError(f"{push.folder}: {listed}; fetch or convert the artifact again")


def carry_out(push: Push, message: str | None = None, on_note: OnNote = quiet) -> Pushed:
    """Upload and commit. The files are taken to be those of the manifest: see :func:`check_files`.

    Raises RemoteError for the Hub, also where somebody else committed meanwhile, and DataError for a file that changed
    meanwhile. The branch is then as it was.
    """
    name = push.changes.hub_id.name
    api = new_api(name)
    require_token(name)
    with hub_errors(name), told(on_note):
        parent = _make_place(api, push, on_note)
        operations = _upload(api, push)
        return _commit(api, push, parent, operations, message or _summary(push.manifest), on_note)


def _place(repository: str, revision: str | None) -> HubId:
    hub_id = parse_hub_id(repository, revision)
    if hub_id is None:
        raise UsageError(f"{repository}: not a Hub id (owner/name)")
    if hub_id.is_pinned:
        raise UsageError(f"{hub_id}: a commit cannot be pushed to; give a branch")
    return hub_id


def _look(hub_id: HubId, on_note: OnNote) -> tuple[Snapshot | None, Literal["repository", "branch"] | None]:
    """What the commit will be made on, and what is to be made before; a new branch begins where main is."""
    new_api(str(hub_id))
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        try:
            return online_snapshot(hub_id, on_note), None
        except RevisionNotFoundError:
            if hub_id.revision == MAIN:
                raise
            return online_snapshot(HubId(hub_id.name), on_note), "branch"
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise explained(error, str(hub_id)) from error
        return None, "repository"
    except LbqError:
        raise
    except Exception as error:
        raise explained(error, str(hub_id)) from error


def _files(folder: Path, manifest: Manifest) -> tuple[Upload, ...]:
    """Those of the manifest, and the manifest."""
    own = hash_file(folder / MANIFEST)
    entries = {**manifest.files, MANIFEST: own}
    return tuple(Upload(name, folder / name, entry.size, entry.sha256) for name, entry in sorted(entries.items()))


def _card(folder: Path, manifest: Manifest, hub_id: HubId, remote: Snapshot | None, on_note: OnNote) -> Upload:
    """The card, made on top of the folder's own, or else of the repository's."""
    theirs = read_card(remote.fetch(README)) if remote is not None and README in remote.files else None
    ours = _own_card(folder)
    if ours is not None and theirs is not None and differ_outside(ours, theirs):
        on_note(f"{hub_id}: the folder's {README} replaces the repository's")
    made = card_of(folder, manifest, hub_id, theirs if ours is None else ours)
    if "base_model" not in parse_card(made, README).metadata:
        on_note(f"the source was a folder, so that the card names no base_model: add one to its metadata in {README}")
    return Upload.of_bytes(README, made.encode())


def _own_card(folder: Path) -> str | None:
    path = folder / README
    return read_card(path) if path.is_file() else None


def _make_place(api: HfApi, push: Push, on_note: OnNote) -> str:
    """Make the repository or the branch, if need be; the commit to build on."""
    hub_id, parent = push.changes.hub_id, push.changes.parent
    if push.makes == "repository":
        api.create_repo(hub_id.name, private=push.private)
        parent = online_snapshot(HubId(hub_id.name), on_note).commit
    assert parent is not None
    if push.makes and hub_id.revision != MAIN:
        api.create_branch(hub_id.name, branch=hub_id.revision, revision=parent)
    return parent


def _upload(api: HfApi, push: Push) -> list[CommitOperationAdd]:
    """Put the large files where a commit can name them; what is there from an earlier attempt is not sent again."""
    from huggingface_hub import CommitOperationAdd

    changes = push.changes
    operations = []
    for file in changes.uploads:
        content: Any = file.content if isinstance(file.content, bytes) else str(file.content)
        operations.append(CommitOperationAdd(file.name, content))
    api.preupload_lfs_files(
        changes.hub_id.name,
        additions=operations,
        revision=changes.hub_id.revision,
        create_pr=push.create_pr,
        free_memory=False,
    )
    for file, operation in zip(changes.uploads, operations, strict=True):
        if operation.upload_info.sha256.hex() != file.sha256:
            raise DataError(f"{push.folder / file.name}: changed while it was pushed; run again")
        if getattr(operation, "_should_ignore", False):
            raise UsageError(f"{changes.hub_id}: the repository's .gitignore keeps {file.name} out; take it from there")
    return operations


def _commit(
    api: HfApi, push: Push, parent: str, additions: list[CommitOperationAdd], message: str, on_note: OnNote
) -> Pushed:
    """Commit on top of ``parent``; when no answer comes, look whether it was done before trying again."""
    from huggingface_hub import CommitOperationDelete

    hub_id, waits = push.changes.hub_id, iter(WAITS)
    deletions = [CommitOperationDelete(name, is_folder=False) for name in push.changes.deleted]
    while True:
        try:
            made = api.create_commit(
                hub_id.name,
                [*additions, *deletions],
                commit_message=message,
                revision=hub_id.revision,
                create_pr=push.create_pr,
                parent_commit=parent,
            )
        except Exception as error:
            wait = next(waits, None)
            if wait is None or not is_passing(root_of(error)):
                raise
            if push.create_pr and status_of(root_of(error)) != 429:
                where = f"{api.endpoint}/{hub_id.name}/discussions"
                raise RemoteError(f"{hub_id}: no answer: look whether {where} has it, and run again if not") from error
            on_note(f"{explained(error, str(hub_id))}; trying again in {wait} s")
            time.sleep(wait)
            if done := _done(api, push, parent, on_note):
                return done
        else:
            return Pushed(made.oid, str(made.commit_url), made.pr_url)


def _done(api: HfApi, push: Push, parent: str, on_note: OnNote) -> Pushed | None:
    """The commit that was made although no answer came."""
    hub_id = push.changes.hub_id
    now = online_snapshot(hub_id, on_note)
    if now.commit == parent:
        return None
    if not push.changes.are_in(now.files):
        raise RemoteError(f"{hub_id}: somebody else committed meanwhile; run again to push onto what is there now")
    return Pushed(now.commit, f"{api.endpoint}/{hub_id.name}/commit/{now.commit}")


def _summary(manifest: Manifest) -> str:
    method = manifest.method
    what = f"INT{method.bits}" if method.bits else f"{manifest.summary.bits_per_weight:.2f} bits a weight"
    return f"{manifest.source.name}, {what}, by lbq {__version__}"
