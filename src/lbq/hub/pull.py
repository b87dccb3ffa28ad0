"""``lbq pull``: a whole artifact from the Hub, every file checked, in the cache or in a folder of its own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lbq.formats.disk import BLOCK, FileEntry, require_space, storage_errors
from lbq.formats.errors import DataError, UsageError
from lbq.formats.manifest import MANIFEST, read_manifest
from lbq.formats.staging import StagedFolder, check_target
from lbq.hub.artifacts import OnBytes, fetch_artifact
from lbq.hub.client import OnNote, quiet
from lbq.hub.names import find_model
from lbq.hub.snapshot import open_snapshot


def pull(
    model: str,
    out: Path | None = None,
    revision: str | None = None,
    *,
    overwrite: bool = False,
    on_note: OnNote = quiet,
    on_bytes: OnBytes | None = None,
) -> Path:
    """Fetch the artifact that a Hub id names and check all of it; the folder, ``out`` or one in the standard cache.

    Files that are in the cache and broken are fetched again. ``out`` appears whole or not at all, and the cache keeps
    its copy: a pull that was cut goes on with the files that are there. Raises UsageError for a folder, DataError,
    RemoteError, StorageError and BusyError as :func:`lbq.hub.artifacts.find_artifact` and StagedFolder do.
    """
    found = find_model(model, revision)
    if isinstance(found, Path):
        raise UsageError(f"{model}: a folder; give a Hub id (owner/name)")
    if out is not None:
        check_target(out, overwrite=overwrite)
    folder = fetch_artifact(open_snapshot(found, on_note), thorough=True, on_bytes=on_bytes)
    if out is None:
        return folder
    _copy(folder, out, overwrite=overwrite)
    return out


def _copy(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Copy an artifact into a folder of its own."""
    files = read_manifest(folder).files
    require_space(out, sum(entry.size for entry in files.values()))
    with StagedFolder(out, overwrite=overwrite, source=folder) as stage:
        for name, entry in files.items():
            if _copy_file(folder / name, stage.path(name)) != entry:
                raise DataError(f"{folder / name}: changed while it was copied; run again")
        stage.add_file(MANIFEST, (folder / MANIFEST).read_bytes())
        stage.commit()


def _copy_file(source: Path, target: Path) -> FileEntry:
    """Copy a file's content; size and hash of what was read."""
    part = target.with_name(target.name + ".part")
    digest, size = hashlib.sha256(), 0
    with storage_errors(part, source.stat().st_size), source.open("rb") as old, part.open("xb") as new:
        while block := old.read(BLOCK):
            digest.update(block)
            size += new.write(block)
        new.flush()
        os.fsync(new.fileno())
        os.rename(part, target)
    return FileEntry(size, digest.hexdigest())
