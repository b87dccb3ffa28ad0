"""What a push would change: the files of an artifact against those of a repository."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lbq.formats.disk import listed
from lbq.formats.errors import DataError, UsageError
from lbq.formats.manifest import MANIFEST, file_names
from lbq.hub.card import README
from lbq.hub.client import OnNote
from lbq.hub.names import HubId
from lbq.hub.snapshot import RemoteFile, Snapshot

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")  # what loaders look for by themselves


@dataclass(frozen=True)
class Upload:
    """A file as it shall be on the Hub: one on disk, or bytes that were made for the push."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of_bytes(cls, name: str, content: bytes) -> Upload:
        return cls(name, content, len(content), hashlib.sha256(content).hexdigest())

    def is_at(self, remote: RemoteFile | None) -> bool:
        """Whether the repository has the file already; it knows large ones by sha256, others by git's id."""
        if remote is None or remote.size != self.size:
            return False
        return remote.sha256 == self.sha256 if remote.sha256 is not None else remote.blob == self._git_id()

    def _git_id(self) -> str:
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Changes:
    """``parent``: the commit that they are made on; None where the repository is made first."""

    hub_id: HubId
    parent: str | None
    wanted: tuple[Upload, ...]
    uploads: tuple[Upload, ...]  # those of ``wanted`` that are not there
    deleted: tuple[str, ...]  # files of an earlier artifact
    foreign: tuple[str, ...]  # files that are not lbq's, left alone

    @property
    def is_empty(self) -> bool:
        """Whether the repository is as it shall be."""
        return not self.uploads and not self.deleted

    def are_in(self, files: Mapping[str, RemoteFile]) -> bool:
        """Whether a repository with these files has them."""
        return all(file.is_at(files.get(file.name)) for file in self.wanted) and not files.keys() & set(self.deleted)


def find_changes(wanted: tuple[Upload, ...], hub_id: HubId, remote: Snapshot | None, on_note: OnNote) -> Changes:
    """Compare. Raises UsageError where weights that are not lbq's would stand beside the artifact's."""
    if remote is None:
        return Changes(hub_id, None, wanted, wanted, (), ())
    names = {file.name for file in wanted}
    earlier = _earlier_files(remote, on_note)
    others = remote.files.keys() - earlier - {README, ".gitattributes"}
    if weights := sorted(name for name in others if any(fnmatchcase(name, pattern) for pattern in WEIGHTS)):
        raise UsageError(
            f"{hub_id}: holds {listed(weights)}, not of an lbq artifact: loaders would mix the two; "
            "push to a repository of its own"
        )
    if replaced := sorted(others & names):
        on_note(f"{hub_id}: replaces {listed(replaced)}, not of an lbq artifact")
    return Changes(
        hub_id,
        remote.commit,
        wanted,
        tuple(file for file in wanted if not file.is_at(remote.files.get(file.name))),
        tuple(sorted(earlier & remote.files.keys() - names)),
        tuple(sorted(others - names)),
    )


def _earlier_files(remote: Snapshot, on_note: OnNote) -> frozenset[str]:
    """The files that the repository's own manifest lists, and itself; none where there is no manifest."""
    if MANIFEST not in remote.files:
        return frozenset()
    try:
        return file_names(remote.fetch(MANIFEST).parent)
    except DataError:
        on_note(f"{remote}: its {MANIFEST} cannot be read: files of an earlier artifact are not told from others")
        return frozenset({MANIFEST})
