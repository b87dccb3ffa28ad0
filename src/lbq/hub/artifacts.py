"""Artifacts from the Hub: found by name, fetched file by file, checked against their manifest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lbq.formats.disk import FileEntry, hash_file
from lbq.formats.errors import DataError
from lbq.formats.manifest import CHECKPOINT, MANIFEST, REPORT, read_manifest
from lbq.hub.client import OnNote, quiet
from lbq.hub.names import find_model
from lbq.hub.snapshot import Snapshot, open_snapshot

OnBytes = Callable[[str, int], None]  # file name, bytes of it that were checked or copied


def find_artifact(
    model: Path | str, revision: str | None = None, *, weights: bool = True, on_note: OnNote = quiet
) -> Path:
    """The folder of an artifact: ``model`` itself, or that of a Hub id in the standard cache.

    Of a Hub id the files that its manifest lists are fetched, or with ``weights=False`` the manifest and the report.
    What a fetch brings is checked against the manifest. A folder is taken as it is.

    Raises StorageError for what is neither, DataError for a repository that holds no artifact or another than its
    manifest says, RemoteError for the Hub.
    """
    found = find_model(model, revision)
    return found if isinstance(found, Path) else fetch_artifact(open_snapshot(found, on_note), weights=weights)


def fetch_artifact(
    snapshot: Snapshot, *, weights: bool = True, thorough: bool = False, on_bytes: OnBytes | None = None
) -> Path:
    """Fetch the artifact in a snapshot; arguments, result and errors as :func:`find_artifact`.

    ``thorough``: what is in the cache is checked, too, and fetched again where it is broken. ``on_bytes(name, n)``
    hears of what was checked.
    """
    if MANIFEST not in snapshot.files:
        raise DataError(f"{snapshot.hub_id}: not an lbq artifact (no {MANIFEST}); {CHECKPOINT}")
    folder = snapshot.fetch(MANIFEST).parent
    for name, entry in read_manifest(folder).files.items():
        if not (weights or name == REPORT):
            continue
        seen = partial(on_bytes, name) if on_bytes else None
        present = snapshot.cached(name)
        if present is not None and thorough and hash_file(present, seen) != entry:
            snapshot.forget(name)
            present = None
        if present is None:
            _fetch_checked(snapshot, name, entry, seen)
    return folder


def _fetch_checked(snapshot: Snapshot, name: str, entry: FileEntry, on_bytes: Callable[[int], None] | None) -> None:
    """Fetch a file and compare it with its entry; first by what the Hub says of it, where it does."""
    remote = snapshot.files.get(name)
    if remote is None and snapshot.online:
        raise DataError(f"{snapshot}: {name} is missing, which its {MANIFEST} lists; push the artifact again")
    problem = _difference(entry, remote.size, remote.sha256) if remote is not None else None
    if problem is None:
        got = hash_file(snapshot.fetch(name), on_bytes)
        problem = _difference(entry, got.size, got.sha256)
    if problem is not None:
        snapshot.forget(name)
        raise DataError(f"{snapshot}: {name} is not the file of its {MANIFEST}: {problem}; push the artifact again")


def _difference(entry: FileEntry, size: int | None, sha256: str | None) -> str | None:
    if size is not None and size != entry.size:
        return f"{size} bytes instead of {entry.size}"
    if sha256 is not None and sha256 != entry.sha256:
        return "another sha256"
    return None
