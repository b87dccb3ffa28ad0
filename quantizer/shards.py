"""The shards of an artifact while they are being written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from lbq.formats.disk import FileEntry
from lbq.formats.safetensors_file import INDEX
from lbq.formats.safetensors_writer import ShardWriter, TensorPlan, index_json, plan_shards, shard_names


class Folder(Protocol):
    """Where files are written: an :class:`lbq.formats.staging.StagedFolder`."""

    def path(self, name: str) -> Path: ...

    def add_file(self, name: str, content: bytes) -> FileEntry: ...


class Shards:
    """All safetensors files of an artifact. A file is opened by its first tensor and finished by its last, so that few
    are open at a time when tensors come in the order of the plan, however many there are.

    ``written`` are tensors, and ``files`` whole files, that an interrupted
    conversion of the same plan has left there.
    """

    def __init__(
        self,
        folder: Folder,
        tensors: Iterable[TensorPlan],
        max_bytes: int,
        written: frozenset[str] = frozenset(),
        files: Mapping[str, FileEntry] | None = None,
    ) -> None:
        self._folder, self._written = folder, written
        self._shards = plan_shards(tensors, max_bytes)
        self._names = shard_names(len(self._shards))
        self._number = {tensor.name: i for i, shard in enumerate(self._shards) for tensor in shard}
        self._left = [sum(tensor.name not in written for tensor in shard) for shard in self._shards]
        self._open: dict[int, ShardWriter] = {}
        self.files = dict(files or {})  # those that are whole

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor into its shard."""
        i = self._number[name]
        if i not in self._open:
            self._open[i] = ShardWriter(self._folder.path(self._names[i]), self._shards[i], self._written)
        self._open[i].write(name, tensor)
        self._left[i] -= 1
        if not self._left[i]:
            self.files[self._names[i]] = self._open.pop(i).finish()

    def sync(self) -> None:
        """What is written is on the disk."""
        for writer in self._open.values():
            writer.sync()

    def finish(self) -> dict[str, FileEntry]:
        """After the last tensor: write the index where there are several shards. Returns all files by name."""
        assert not any(self._left), "tensors are missing"
        if len(self._shards) > 1:
            self.files[INDEX] = self._folder.add_file(INDEX, index_json(self._shards))
        return self.files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for writer in self._open.values():
            writer.close()
