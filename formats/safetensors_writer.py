"""Writing safetensors: one shard in little memory, and the plan that spreads a model over shards.

The ``safetensors`` package takes a whole shard at once; here a tensor is on the disk before the next is made.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import torch

from lbq.formats import json_file
from lbq.formats.disk import BLOCK, FileEntry, hash_file, listed, storage_errors, write_at
from lbq.formats.safetensors_file import DTYPES, MAX_HEADER, SINGLE, HeaderEntry

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_RANK: Final = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order, in little memory.

    The bytes depend only on the plan and the content: data lie by falling item size and then by name, which aligns
    them and is what the ``safetensors`` package does. The file is written under ``PATH.part`` and takes its name in
    :meth:`finish`. Raises :class:`StorageError` when the disk is full or refuses; the caller removes what is left.

    ``written`` are tensors that an interrupted writer of the same plan had written and synced: it goes on with what
    that one left.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorPlan], written: Container[str] = ()) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        plans = sorted(tensors, key=lambda plan: (-_RANK[plan.dtype], plan.name))
        header, self._left = _header(plans)
        self.size = len(header) + sum(plan.nbytes for plan in plans)
        done = [plan.name for plan in plans if plan.name in written]
        for name in done:
            del self._left[name]
        with storage_errors(path, self.size):
            fresh = 0 if done else os.O_CREAT | os.O_TRUNC
            self._descriptor = os.open(self._part, os.O_WRONLY | os.O_CLOEXEC | fresh, 0o666)
            try:
                write_at(self._descriptor, memoryview(header), 0)
            except OSError:
                os.close(self._descriptor)
                raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor from any device and of any strides."""
        assert name in self._left, f"{name} is not planned, or written twice"
        plan, offset = self._left.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (plan.dtype, plan.shape), f"{name}: not as planned"
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        with storage_errors(self.path, self.size):
            for block in torch.split(flat, BLOCK):
                write_at(self._descriptor, block.cpu().numpy().data, offset)
                offset += block.numel()

    def sync(self) -> None:
        """What is written is on the disk."""
        with storage_errors(self.path, self.size):
            os.fsync(self._descriptor)

    def finish(self) -> FileEntry:
        """Sync, hash what was written and give the file its name."""
        assert not self._left, f"never written: {listed(list(self._left))}"
        with storage_errors(self.path, self.size):
            os.fsync(self._descriptor)
            self.close()
            written = hash_file(self._part)
            os.rename(self._part, self.path)
        assert written.size == self.size
        return written

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _header(plans: list[TensorPlan]) -> tuple[bytes, dict[str, tuple[TensorPlan, int]]]:
    """Length and header as bytes, padded with spaces to eight; and where in the file each tensor goes."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for plan in plans:
        assert plan.name not in content, f"{plan.name} is planned twice"
        offsets[plan.name] = end
        entry = HeaderEntry(_NAMES[plan.dtype], plan.shape, (end, end := end + plan.nbytes))
        content[plan.name] = entry
    text = msgspec.json.encode(content)
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {p.name: (p, base + offsets[p.name]) for p in plans}


def plan_shards(tensors: Iterable[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    """Split tensors, in their order, into shards of at most ``max_bytes`` of data; a larger tensor gets its own."""
    shards: list[list[TensorPlan]] = []
    room = 0
    for plan in tensors:
        if plan.nbytes > room or not shards:
            shards.append([])
            room = max_bytes
        shards[-1].append(plan)
        room -= plan.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """The file names that transformers gives to ``count`` shards."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def index_json(shards: Sequence[Sequence[TensorPlan]]) -> bytes:
    """The content of ``model.safetensors.index.json``, which goes with more than one shard."""
    names = shard_names(len(shards))
    weight_map = {plan.name: file for file, shard in zip(names, shards, strict=True) for plan in shard}
    total = sum(plan.nbytes for shard in shards for plan in shard)
    return json_file.encode({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
