"""Safetensors files and checkpoints made of them, mapped, by a reader that trusts nothing.

Why not the ``safetensors`` package, which is the oracle of the tests: errors must name the file and the tensor, and
consumed pages must be given back while a checkpoint larger than memory streams through.

The format: eight bytes with the length of the header, little endian; the header, JSON; the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Annotated, Final, Protocol, Self

import msgspec
import torch

from lbq.formats.disk import check_plain_name, listed, shown, storage_errors
from lbq.formats.errors import DataError, StorageError
from lbq.formats.json_file import decode_last, read
from lbq.formats.unique_keys import check_unique_keys

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

# Bounds time and memory on hostile input; 150,000 tensors in one file fit.
MAX_HEADER: Final = 16 << 20
MAX_ENTRY: Final = 4096  # bytes of one tensor's entry: more than its largest shape needs
MAX_DIMS: Final = 64  # torch's own limit in most operations
_LIMIT: Final = 2**63 - 1

# In the order of the safetensors package's own enumeration, by which it lays out a file.
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "F64": torch.float64,
        "I64": torch.int64,
        "U64": torch.uint64,
    }
)

_Count = Annotated[int, msgspec.Meta(ge=0, le=_LIMIT)]
# The mapping is private and writable so that torch takes it without a warning; a stray write stays in this process.
# No swap is reserved for it: otherwise a file larger than the memory could not be mapped.
_MAP_FLAGS: Final = mmap.MAP_PRIVATE | (getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0)


class HeaderEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header says of one tensor; offsets count from the end of the header."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes [start, stop) of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.stop - self.start


class TensorFile(Protocol):
    """A safetensors file, here or elsewhere, as :class:`Checkpoint` uses it."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    def info(self, name: str) -> TensorInfo: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def piece(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def release(self, name: str) -> None: ...

    def close(self) -> None: ...


ReadBytes = Callable[[int, int], bytes]  # (count, at): bytes of a file, fewer only at its end
ReadHeader = Callable[[Path, int, ReadBytes], Mapping[str, TensorInfo]]  # of a file of so many bytes


class MappedFile:
    """A file of tensors, mapped. Opening reads and checks the header only, which ``read_header`` does.

    Raises what ``read_header`` raises, and :class:`StorageError` if the file cannot be read. A file that shrinks while
    it is mapped is beyond what can be handled.
    """

    def __init__(self, path: Path, read_header: ReadHeader) -> None:
        self.path = path
        with storage_errors(path):
            descriptor = _open_regular(path)
            try:
                size = os.fstat(descriptor).st_size
                self.tensors = read_header(path, size, lambda count, at: os.pread(descriptor, count, at))
                mapping = mmap.mmap(descriptor, size, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            finally:
                os.close(descriptor)
        self._mapping: mmap.mmap | None = mapping
        # Never closed by hand: it is unmapped when this object and the last tensor that looks into it have gone.
        self._bytes: torch.Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)

    def info(self, name: str) -> TensorInfo:
        """The header's entry; :class:`DataError` if there is none."""
        return find_tensor(self, name)

    def piece(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the tensor, flat."""
        return self.tensor(name).flatten()[start:stop]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, without a copy, to be read only; it stays valid after :meth:`close`.

        A tensor that the file does not align to its item size is copied.
        """
        assert self._bytes is not None, "closed"
        info = self.info(name)
        raw = self._bytes[info.start : info.stop]
        if info.start % info.dtype.itemsize:
            raw = raw.clone()
        return raw.view(info.dtype).view(info.shape)

    def release(self, name: str) -> None:
        """Give the tensor's resident pages back to the system; they are read again on the next use."""
        assert self._mapping is not None, "closed"
        info = self.info(name)
        start = info.start - info.start % mmap.PAGESIZE
        if info.nbytes:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, info.stop - start)

    def close(self) -> None:
        """Let go of the mapping; tensors that were handed out keep it alive."""
        self._mapping = self._bytes = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class SafetensorsFile(MappedFile):
    """A safetensors file; :class:`DataError` if it is anything but a whole, well-formed one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_header)


def find_tensor(file: TensorFile, name: str) -> TensorInfo:
    """The header's entry; :class:`DataError` if there is none."""
    info = file.tensors.get(name)
    if info is None:
        raise DataError(f"{file.path}: tensor {shown(name)} is missing")
    return info


def _open_regular(path: Path) -> int:
    # O_NONBLOCK: opening a pipe must not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"{path}: not a file")
    return descriptor


def read_header(path: Path, size: int, read: ReadBytes) -> Mapping[str, TensorInfo]:
    """Read and check the header of a file of ``size`` bytes; gives its tensors in the order of their data.

    Raises :class:`DataError`.
    """
    if size < 8:
        raise DataError(f"{path}: {size} bytes, too short for a safetensors file; fetch it again")
    length = int.from_bytes(read(8, 0), "little")
    if length < 2:
        raise DataError(f"{path}: empty safetensors header; fetch the file again")
    if length > size - 8:
        raise DataError(
            f"{path}: the header should have {length} bytes, the file has {size}: "
            "cut short or not a safetensors file; fetch it again"
        )
    if length > MAX_HEADER:
        raise DataError(f"{path}: header of {length} bytes; lbq reads up to {MAX_HEADER}")
    header = read(length, 8)
    if len(header) != length:
        raise DataError(f"{path}: cut short inside the header; fetch it again")
    return parse_header(path, header, size)


def parse_header(path: Path, header: bytes, size: int) -> Mapping[str, TensorInfo]:
    """Decode and check the header of a file of ``size`` bytes; gives its tensors in the order of their data."""
    if header[:1] != b"{":
        raise DataError(f"{path}: the header is not a JSON object; not a safetensors file")
    entries = decode_last(header, dict[str, msgspec.Raw], f"{path}: header")
    if "__metadata__" in entries:
        decode_last(bytes(entries.pop("__metadata__")), dict[str, str], f"{path}: header: __metadata__")
    base = 8 + len(header)
    tensors = [_tensor_info(f"{path}: tensor {shown(name)}", name, raw, base) for name, raw in entries.items()]
    check_unique_keys(header, f"{path}: header")
    tensors.sort(key=lambda info: (info.start, info.stop))
    _check_layout(path, tensors, base, size)
    return MappingProxyType({info.name: info for info in tensors})


def _tensor_info(where: str, name: str, raw: msgspec.Raw, base: int) -> TensorInfo:
    text = bytes(raw)
    if len(text) > MAX_ENTRY:
        raise DataError(f"{where}: header entry of {len(text)} bytes")
    entry = decode_last(text, HeaderEntry, where)
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise DataError(f"{where}: unknown dtype {shown(entry.dtype)}")
    if len(entry.shape) > MAX_DIMS:
        raise DataError(f"{where}: {len(entry.shape)} dimensions")
    # Empty dimensions count as one: torch computes strides that way, and they must not overflow either. A minus that
    # has survived the decoding is that of -0.
    if prod(max(1, size) for size in entry.shape) * dtype.itemsize > _LIMIT or b"-" in text:
        raise DataError(f"{where}: impossible shape {shown(str(list(entry.shape)))}")
    start, stop = entry.data_offsets
    nbytes = prod(entry.shape) * dtype.itemsize
    if stop - start != nbytes:
        raise DataError(
            f"{where}: {entry.dtype} {list(entry.shape)} takes {nbytes} bytes, data_offsets give {stop - start}"
        )
    return TensorInfo(name, dtype, entry.shape, base + start, base + stop)


def _check_layout(path: Path, tensors: list[TensorInfo], base: int, size: int) -> None:
    """Tensors, in the order of their data, must cover the rest of the file: no overlap, no hole, nothing left."""
    end, before = base, "the header"
    for info in tensors:
        if info.start != end:
            fault = "overlaps" if info.start < end else f"lies {info.start - end} bytes behind"
            raise DataError(f"{path}: tensor {shown(info.name)} {fault} {before}; the file is broken")
        end, before = info.stop, f"tensor {shown(info.name)}"
    if end > size:
        cut = next(info.name for info in tensors if info.stop > size)
        raise DataError(
            f"{path}: cut short inside tensor {shown(cut)}: {size} bytes, the header asks for {end}; fetch it again"
        )
    if end < size:
        raise DataError(f"{path}: {size - end} bytes after {before}, the last tensor; the file is broken")


class Checkpoint:
    """The tensors of a folder, in one file or in shards. Nothing is read before it is used."""

    def __init__(self, folder: Path, files: Mapping[str, TensorFile]) -> None:
        self.folder = folder
        self.files = files  # by file name
        self._home = {name: file for file in files.values() for name in file.tensors}

    def names(self) -> tuple[str, ...]:
        """All tensors, file after file, in the order of their data."""
        return tuple(self._home)

    def info(self, name: str) -> TensorInfo:
        """The header's entry; :class:`DataError` if no file has the tensor."""
        return self._file(name).info(name)

    def tensor(self, name: str) -> torch.Tensor:
        """See :meth:`SafetensorsFile.tensor`."""
        return self._file(name).tensor(name)

    def piece(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :meth:`SafetensorsFile.piece`."""
        return self._file(name).piece(name, start, stop)

    def release(self, name: str) -> None:
        """See :meth:`SafetensorsFile.release`."""
        self._file(name).release(name)

    def close(self) -> None:
        """Let go of all mappings; tensors that were handed out stay valid."""
        for file in self.files.values():
            file.close()

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self._file(name).path.name

    def _file(self, name: str) -> TensorFile:
        file = self._home.get(name)
        if file is None:
            raise DataError(f"{self.folder}: tensor {shown(name)} is missing")
        return file

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def open_files(paths: Sequence[Path]) -> Sequence[TensorFile]:
    """Open files that are here."""
    return [SafetensorsFile(path) for path in paths]


def open_checkpoint(
    folder: Path,
    present: Iterable[str] | None = None,
    open_shards: Callable[[Sequence[Path]], Sequence[TensorFile]] = open_files,
) -> Checkpoint:
    """Open ``model.safetensors``, or else ``model.safetensors.index.json`` and its shards; reads headers only.

    ``present`` are the names of the files, by default those in the folder; ``open_shards`` opens those that hold
    tensors, which may be elsewhere.

    Raises :class:`DataError` where index and shards disagree, where there are only pickles, or where a file is broken;
    :class:`StorageError` for a folder that is missing or cannot be read.
    """
    if present is None:
        with storage_errors(folder):
            present = os.listdir(folder)
    present = sorted(present)
    if SINGLE in present:
        return Checkpoint(folder, {SINGLE: open_shards([folder / SINGLE])[0]})
    if INDEX not in present:
        raise DataError(f"{folder}: {_no_weights(present)}")
    path = folder / INDEX
    weight_map = read(path, _Index, MAX_HEADER).weight_map
    shards = list(dict.fromkeys(check_plain_name(shard, str(path)) for shard in weight_map.values()))
    if gone := [shard for shard in shards if shard not in present]:
        raise DataError(f"{path}: missing files: {listed(gone)}; fetch them")
    files = dict(zip(shards, open_shards([folder / shard for shard in shards]), strict=True))
    _check_index(path, weight_map, files)
    return Checkpoint(folder, files)


def _no_weights(present: list[str]) -> str:
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        return (
            f"only pickled weights ({listed(pickles)}), which lbq never loads because they can run code; "
            "get the model as safetensors"
        )
    return f"neither {SINGLE} nor {INDEX}"


def _check_index(path: Path, weight_map: Mapping[str, str], files: Mapping[str, TensorFile]) -> None:
    """Each tensor must be in the shard that the index says, and nowhere else."""
    missing = [name for name, shard in weight_map.items() if name not in files[shard].tensors]
    if missing:
        raise DataError(f"{path}: tensors missing from their shards: {listed(missing)}")
    stray = [(name, shard) for shard, file in files.items() for name in file.tensors if weight_map.get(name) != shard]
    twice = [name for name, _ in stray if name in weight_map]
    if twice:
        raise DataError(f"{path}: tensors in more than one shard: {listed(twice)}")
    if stray:
        raise DataError(f"{path}: tensors in shards but not in the index: {listed([name for name, _ in stray])}")
