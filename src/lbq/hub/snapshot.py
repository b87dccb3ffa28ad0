"""A repository at one commit: its files come into the client's standard cache when they are asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lbq.formats.disk import check_plain_name, shown, storage_errors, write_at
from lbq.formats.errors import DataError, LbqError, RemoteError
from lbq.formats.manifest import MANIFEST
from lbq.hub.client import (
    TIMEOUT,
    OnNote,
    explained,
    hub_errors,
    is_offline,
    is_passing,
    is_unreachable,
    new_api,
    open_range,
    patiently,
    quiet,
    root_of,
    told,
)
from lbq.hub.names import HubId, is_commit

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

SLOW = 10 << 20  # bytes of a file whose download is worth a bar


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; what is None the Hub did not say. Git knows a small file by ``blob``."""

    name: str
    size: int | None = None
    sha256: str | None = None  # of large files
    blob: str | None = None


class Snapshot:
    """A repository at ``commit``. ``files`` are all of it or, while the Hub is out of reach, those in the cache."""

    def __init__(
        self,
        hub_id: HubId,
        commit: str,
        files: Mapping[str, RemoteFile],
        api: HfApi,
        on_note: OnNote,
        *,
        online: bool,
        private: bool | None = None,
    ) -> None:
        self.hub_id, self.commit, self.files = hub_id, commit, files
        self.online, self._api, self._on_note = online, api, on_note
        self._branch_is_known = hub_id.is_pinned or not online
        self.private = private

    def __str__(self) -> str:
        return f"{self.hub_id.name}@{self.commit[:12]}"

    def cached(self, name: str) -> Path | None:
        """Where a file lies that was fetched before."""
        return _cached(self.hub_id.name, name, self.commit)

    def fetch(self, name: str) -> Path:
        """A file in the cache, fetched if need be; all files of a snapshot lie in one folder.

        Raises DataError for a name that is not plain, RemoteError for the Hub, StorageError for the disk.
        """
        check_plain_name(name, str(self))
        present = self.cached(name)
        if not self._branch_is_known:
            self._branch_is_known = present is not None and present == _cached(
                self.hub_id.name, name, self.hub_id.revision
            )
        if present is not None and self._branch_is_known:
            return present
        if not self.online:
            raise RemoteError(f"{self}: {name} is not in the cache, and the Hub is out of reach: run again with it")
        remote = self.files.get(name)
        slow = remote is None or remote.size is None or remote.size >= SLOW
        with hub_errors(f"{self.hub_id}: {name}"), told(self._on_note, bars=slow):
            return self._download(name)

    def size(self, name: str) -> int:
        """The bytes of a file. Raises RemoteError where the Hub did not say."""
        size = self.files[name].size
        if size is None:
            raise RemoteError(f"{self}: the Hub does not say how large {name} is; look at HF_ENDPOINT")
        return size

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, as many as it has, without fetching the rest; safe in several threads.

        Raises RemoteError for the Hub.
        """
        if not self.online:
            raise RemoteError(f"{self}: {name} is not in the cache, and the Hub is out of reach: run again with it")

        def ask() -> bytes:
            content = bytearray()
            with open_range(self._api, self.hub_id.name, name, self.commit, start, stop) as blocks:
                for block in blocks:
                    content += block
                    if len(content) >= stop - start:  # else a server without ranges would send all of the file
                        break
            return bytes(content[: stop - start])

        with hub_errors(f"{self.hub_id}: {name}"):
            return patiently(ask, quiet)

    def download(self, name: str, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Fetch a file to ``path`` and not into the cache; what an interrupted call has left beside it is gone on with.

        ``on_bytes`` hears of all bytes that are there, and may raise to end it. The content is not checked. For use in
        any thread. Raises DataError for a name that is not plain, RemoteError for the Hub, StorageError for the disk.
        """
        check_plain_name(name, str(self))
        total, part = self.size(name), path.with_name(f"{path.name}.part")
        here = part.stat().st_size if part.exists() else 0

        def go_on() -> None:
            nonlocal here
            with storage_errors(path):
                file = part.open("r+b" if here else "wb", buffering=0)
            with file, open_range(self._api, self.hub_id.name, name, self.commit, here, total) as blocks:
                for block in blocks:
                    with storage_errors(path, total - here):
                        write_at(file.fileno(), memoryview(block), here)
                    here += len(block)
                    on_bytes(here)

        with hub_errors(f"{self.hub_id}: {name}"):
            while here < total:
                before = here
                try:
                    patiently(go_on, quiet)
                except Exception as error:
                    if here == before or not is_passing(root_of(error)):  # else these attempts were worth it
                        raise
                if here == before or here > total:
                    raise RemoteError(f"{self}: {name}: {here} bytes came, and {total} were said; look at HF_ENDPOINT")
        os.rename(part, path)

    def forget(self, name: str) -> None:
        """Remove a file from the cache, content and all."""
        path = self.cached(name)
        if path is not None:
            with storage_errors(path):
                content = path.resolve()
                path.unlink()
                content.unlink(missing_ok=True)

    def _download(self, name: str) -> Path:
        if not self._branch_is_known:
            # Asked for by the branch's name, so that the cache notes where the branch is, for times without a network.
            path = self._download_at(name, self.hub_id.revision)
            self._branch_is_known = True
            if path.parent.name == self.commit:  # else it has just moved
                return path
        return self._download_at(name, self.commit)

    def _download_at(self, name: str, revision: str) -> Path:
        return Path(
            patiently(lambda: self._api.hf_hub_download(self.hub_id.name, name, revision=revision), self._on_note)
        )


def open_snapshot(hub_id: HubId, on_note: OnNote = quiet) -> Snapshot:
    """Ask the Hub which commit a revision is and what it holds; where the Hub is out of reach, the cache knows.

    ``on_note`` hears of that, and of attempts that failed. Raises RemoteError where neither knows, DataError for a
    repository with a file name that would leave a folder, UsageError without ``huggingface_hub``.
    """
    api = new_api(str(hub_id))
    folder = _cached_folder(hub_id)
    try:
        return online_snapshot(hub_id, on_note, patient=folder is None)
    except LbqError:
        raise
    except Exception as error:
        if folder is None or not is_unreachable(error):
            raise explained(error, str(hub_id)) from error
        if not is_offline(error):
            on_note(f"{hub_id}: the Hub is out of reach; taken from the cache at commit {folder.name[:12]}")
        files = {path.name: RemoteFile(path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file()}
        return Snapshot(hub_id, folder.name, files, api, on_note, online=False)


def online_snapshot(hub_id: HubId, on_note: OnNote = quiet, *, patient: bool = True) -> Snapshot:
    """:func:`open_snapshot` by the Hub alone; raises what the client raises, and for what it answers DataError."""
    api = new_api(str(hub_id))

    def ask() -> ModelInfo:
        return api.model_info(hub_id.name, revision=hub_id.revision, files_metadata=True, timeout=TIMEOUT)

    with told(on_note):
        info = patiently(ask, on_note) if patient else ask()
    if info.sha is None or not is_commit(info.sha):
        raise RemoteError(f"{hub_id}: the Hub names no commit; look at HF_ENDPOINT")
    return Snapshot(hub_id, info.sha, _listed(hub_id, info), api, on_note, online=True, private=info.private)


def _listed(hub_id: HubId, info: ModelInfo) -> dict[str, RemoteFile]:
    files = {}
    for file in info.siblings or ():
        _check_inside(file.rfilename, hub_id)
        sha256 = file.lfs.sha256 if file.lfs is not None else None
        files[file.rfilename] = RemoteFile(file.rfilename, file.size, sha256, file.blob_id)
    return files


def _check_inside(name: str, hub_id: HubId) -> None:
    """Raise DataError for a path that is not one below the repository on every system."""
    odd = "\\" in name or not name.isprintable() or re.match(r"[A-Za-z]:", name)
    if odd or any(part in ("", ".", "..") for part in name.split("/")):
        raise DataError(f"{hub_id}: the repository has a file {shown(name)}; it is broken or hostile")


def _cached(name: str, file: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _cached_folder(hub_id: HubId) -> Path | None:
    """The folder of the commit that the revision was when it was last asked for."""
    found = (_cached(hub_id.name, file, hub_id.revision) for file in (MANIFEST, "config.json"))
    return next((path.parent for path in found if path is not None), None)
