"""A checkpoint on the Hub by its headers: what it holds is known, and no weight is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lbq.formats.safetensors_file import (
    Checkpoint,
    SafetensorsFile,
    TensorFile,
    TensorInfo,
    find_tensor,
    open_checkpoint,
    read_header,
)
from lbq.hub.snapshot import Snapshot

FIRST_BYTES = 128 << 10  # most headers are shorter, and then one request is enough
REQUESTS = 8  # headers asked for at a time


class RemoteShard:
    """A safetensors file on the Hub; once :meth:`attach` has been told where it was fetched to, it is that file."""

    def __init__(self, snapshot: Snapshot, name: str) -> None:
        """Reads the header. Raises DataError for one that is broken, RemoteError for the Hub."""
        self.path = Path(str(snapshot.hub_id), name)
        self.size = snapshot.size(name)
        self._snapshot = snapshot
        self._file: SafetensorsFile | None = None
        first = snapshot.read(name, 0, min(FIRST_BYTES, self.size)) if self.size else b""

        def read(count: int, at: int) -> bytes:
            part = first[at : at + count]
            return part if len(part) == count else snapshot.read(name, at, at + count)

        self.tensors = read_header(self.path, self.size, read)

    def attach(self, path: Path) -> None:
        """The file lies in ``path`` now. Raises DataError and StorageError."""
        self._file = SafetensorsFile(path)

    def info(self, name: str) -> TensorInfo:
        """The header's entry; DataError if there is none."""
        return find_tensor(self, name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a file that is attached."""
        assert self._file is not None, f"{self.path} is not here"
        return self._file.tensor(name)

    def piece(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the tensor, flat, asked for alone where the file is not here."""
        if self._file is not None:
            return self._file.piece(name, start, stop)
        info = self.info(name)
        width = info.dtype.itemsize
        stop = min(stop, info.nbytes // width)
        data = self._snapshot.read(self.path.name, info.start + width * start, info.start + width * stop)
        return torch.frombuffer(bytearray(data), dtype=info.dtype)

    def release(self, name: str) -> None:
        """See SafetensorsFile.release; nothing where the file is not here."""
        if self._file is not None:
            self._file.release(name)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def open_remote(snapshot: Snapshot, folder: Path) -> Checkpoint:
    """The checkpoint of a repository whose config and index lie in ``folder``. Shards that lie in the cache are opened
    there, of the others the headers are read. Raises what :func:`open_checkpoint` raises, and RemoteError."""

    def open_shard(path: Path) -> TensorFile:
        present = snapshot.cached(path.name)
        return RemoteShard(snapshot, path.name) if present is None else SafetensorsFile(present)

    def open_shards(paths: Sequence[Path]) -> Sequence[TensorFile]:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(open_shard, paths))

    opened = open_checkpoint(folder, [name for name in snapshot.files if "/" not in name], open_shards)
    return Checkpoint(Path(str(snapshot.hub_id)), opened.files)  # by its name on the Hub in errors
