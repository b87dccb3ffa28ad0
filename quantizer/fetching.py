"""Shards of a checkpoint on the Hub, fetched one after another: the next while one is in use, and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lbq.formats.disk import FileEntry, hash_file, storage_errors
from lbq.formats.errors import RemoteError
from lbq.formats.safetensors_file import TensorFile
from lbq.hub.snapshot import Snapshot
from lbq.quantizer.remote import RemoteShard

PATIENCE = 2.0  # seconds that a conversion which ends early waits for what is on its way
POLL = 0.5  # seconds between two looks at how far a file is

OnFetch = Callable[[str, int, int], None]  # name of the file that is waited for, bytes that are here, bytes in all


@dataclass(frozen=True)
class Fetched:
    """A file that is here, and what it holds."""

    path: Path
    entry: FileEntry


class _StoppedError(Exception):
    """Nobody wants the file any more."""


class _Task(threading.Thread):
    """Fetches and hashes one file; ``here`` is how many of its bytes have come."""

    def __init__(self, snapshot: Snapshot, file: TensorFile, folder: Path) -> None:
        super().__init__(daemon=True)
        self.here = 0
        self.stopped = False
        self._snapshot, self._file, self._folder = snapshot, file, folder
        self._found: Fetched | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._found = self._fetch()
        except BaseException as error:
            self._error = error

    def result(self) -> Fetched:
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found

    def _fetch(self) -> Fetched:
        name, path = self._file.path.name, self._file.path
        if isinstance(self._file, RemoteShard):
            path = self._folder / name
            if not path.exists():
                self._snapshot.download(name, path, self._go_on)
        entry = hash_file(path)
        said = self._snapshot.files[name]
        if entry.sha256 != (said.sha256 or entry.sha256) or entry.size != (said.size or entry.size):
            if path.parent == self._folder:
                path.unlink()
            raise RemoteError(f"{path}: its content is not what the Hub says; remove it if it is there, and run again")
        return Fetched(path, entry)

    def _go_on(self, here: int) -> None:
        self.here = here
        if self.stopped:
            raise _StoppedError


class Fetcher:
    """Gives ``files`` in their order. Those that are not in the cache come into ``folder``: at most two are there at a
    time, the one in use and the next, as long as each is dropped before another is taken. Leaving the context ends
    what is on its way."""

    def __init__(self, snapshot: Snapshot, files: Sequence[TensorFile], folder: Path, on_fetch: OnFetch) -> None:
        self._snapshot, self._files, self._folder, self._on_fetch = snapshot, files, folder, on_fetch
        self._ahead: _Task | None = None
        self._next = 0

    def take(self) -> Fetched:
        """Wait for the next file. Raises RemoteError for the Hub or for content that is not what the Hub says,
        StorageError for the disk."""
        file = self._files[self._next]
        task = self._ahead or self._begin()
        while task.is_alive():
            task.join(POLL)
            if task.is_alive() and isinstance(file, RemoteShard):
                self._on_fetch(file.path.name, task.here, file.size)
        found = task.result()
        self._next += 1
        self._ahead = self._begin() if self._next < len(self._files) else None
        return found

    def drop(self, fetched: Fetched) -> None:
        """Remove a file that is of no more use, unless it lies in the cache."""
        if fetched.path.parent == self._folder:
            with storage_errors(fetched.path):
                fetched.path.unlink()

    def _begin(self) -> _Task:
        task = _Task(self._snapshot, self._files[self._next], self._folder)
        task.start()
        return task

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ahead is not None:
            self._ahead.stopped = True
            self._ahead.join(PATIENCE)
