"""The shards of an artifact while they are being written."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch

from lbq.formats.disk import FileEntry
from lbq.formats.safetensors_file import INDEX
from lbq.formats.safetensors_writer import ShardWriter, TensorPlan, index_json, plan_shards, shard_names
from lbq.formats.staging import StagedFolder


class Shards:
    """All safetensors files of a staged folder. A file is opened by its first tensor and finished by its last, so
    that few are open at a time when tensors come in the order of the plan, however many there are."""

    def __init__(self, stage: StagedFolder, tensors: Iterable[TensorPlan], max_bytes: int) -> None:
        self._stage = stage
        self._shards = plan_shards(tensors, max_bytes)
        self._names = shard_names(len(self._shards))
        self._number = {tensor.name: i for i, shard in enumerate(self._shards) for tensor in shard}
        self._left = [len(shard) for shard in self._shards]
        self._open: dict[int, ShardWriter] = {}
        self._files: dict[str, FileEntry] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor into its shard."""
        i = self._number[name]
        if i not in self._open:
            self._open[i] = ShardWriter(self._stage.path(self._names[i]), self._shards[i])
        self._open[i].write(name, tensor)
        self._left[i] -= 1
        if not self._left[i]:
            self._files[self._names[i]] = self._open.pop(i).finish()

    def finish(self) -> dict[str, FileEntry]:
        """After the last tensor: write the index where there are several shards. Returns all files by name."""
        assert not any(self._left), "tensors are missing"
        if len(self._shards) > 1:
            self._files[INDEX] = self._stage.add_file(INDEX, index_json(self._shards))
        return self._files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for writer in self._open.values():
            writer.close()
