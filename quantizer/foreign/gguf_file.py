"""The container GGUF, versions 2 and 3, by a reader that trusts nothing: metadata, and where the tensors lie.

Magic, version, counts; metadata as key, type, value; for each tensor its name, dimensions (the innermost first), type
and offset; then the data, aligned. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from lbq.formats.disk import shown
from lbq.formats.errors import DataError
from lbq.formats.safetensors_file import MappedFile, ReadBytes, TensorInfo
from lbq.quantizer.foreign.gguf_blocks import BLOCK_TYPES, BlockType

MAX_HEADER = 64 << 20  # vocabularies of a quarter of a million tokens, with their merges, take a tenth
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
ALIGNMENT = 32  # where the metadata does not say

Value = str | int | float | bool
"""Of metadata; an array is left out."""


@dataclass
class Header:
    """What stands before the data. ``blocks``: the types of quantised tensors, whose shape is [rows, bytes]."""

    metadata: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    blocks: dict[str, BlockType] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # in weights


class GgufFile(MappedFile):
    """A GGUF file. Raises DataError for one that is broken or of types that lbq does not read."""

    def __init__(self, path: Path) -> None:
        self.header = Header()
        super().__init__(path, self._parse)

    def _parse(self, path: Path, size: int, read: ReadBytes) -> Mapping[str, TensorInfo]:
        self.header = _Parser(path, size, read(min(size, MAX_HEADER), 0)).parse()
        return self.header.tensors


class _Parser:
    def __init__(self, path: Path, size: int, data: bytes) -> None:
        self._path, self._size, self._data, self._at = path, size, data, 0

    def parse(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise self._error("not a GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            raise self._error(f"GGUF version {version}; lbq reads 2 and 3")
        header = Header()
        tensors, entries = int(self._number("Q")), int(self._number("Q"))
        for _ in range(entries):
            name = self._string()
            if name in header.metadata:
                raise self._error(f"{shown(name)} stands twice in the metadata")
            value = self._value(int(self._number("I")))
            if value is not None:
                header.metadata[name] = value
        found = [self._tensor(header) for _ in range(tensors)]
        alignment = header.metadata.get("general.alignment", ALIGNMENT)
        if not (isinstance(alignment, int) and 1 <= alignment <= 1 << 20):
            raise self._error(f"general.alignment is {alignment}")
        self._place(header, found, -(-self._at // alignment) * alignment, alignment)
        return header

    def _tensor(self, header: Header) -> tuple[str, torch.dtype, tuple[int, ...], int]:
        """The next entry: name, dtype and shape as they lie in the file, and the offset."""
        name = self._string()
        if name in header.shapes:
            raise self._error(f"tensor {shown(name)} stands twice")
        count = int(self._number("I"))
        if not 1 <= count <= 4:
            raise self._error(f"tensor {shown(name)} has {count} dimensions")
        shape = tuple(reversed([int(self._number("Q")) for _ in range(count)]))
        kind, offset = int(self._number("I")), int(self._number("Q"))
        if min(shape) < 1 or prod(shape) > 1 << 40:
            raise self._error(f"tensor {shown(name)} has an impossible shape {list(shape)}")
        header.shapes[name] = shape
        if kind in FLOATS:
            return name, FLOATS[kind], shape, offset
        block = BLOCK_TYPES.get(kind)
        if block is None:
            known = ", ".join(each.name for each in BLOCK_TYPES.values())
            raise self._error(f"tensor {shown(name)} is of type {kind}; lbq reads F32, F16, BF16, {known}")
        if shape[-1] % block.block:
            raise self._error(f"tensor {shown(name)}: {shape[-1]} inputs do not divide into blocks of {block.block}")
        header.blocks[name] = block
        return name, torch.uint8, (*shape[:-1], shape[-1] // block.block * block.nbytes), offset

    def _place(
        self, header: Header, found: list[tuple[str, torch.dtype, tuple[int, ...], int]], base: int, alignment: int
    ) -> None:
        """Tensors follow one another, each aligned, up to the end of the file."""
        end = base
        for name, dtype, shape, offset in sorted(found, key=lambda each: each[3]):
            start = base + offset
            if not end <= start < end + alignment:
                raise self._error(f"tensor {shown(name)} does not follow the one before it; the file is broken")
            end = start + prod(shape) * dtype.itemsize
            if end > self._size:
                raise self._error(f"cut short inside tensor {shown(name)}; fetch it again")
            header.tensors[name] = TensorInfo(name, dtype, shape, start, end)
        if self._size >= end + alignment:
            raise self._error(f"{self._size - end} bytes after the last tensor; the file is broken")

    def _value(self, kind: int) -> Value | None:
        """The next value; None for an array, which is passed over."""
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._number(self._format(kind))
        item, count = int(self._number("I")), int(self._number("Q"))
        if item == STRING:
            for _ in range(count):
                self._bytes(int(self._number("Q")))
        else:
            self._bytes(count * struct.calcsize(self._format(item)))
        return None

    def _format(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise self._error(f"metadata of type {kind}")
        return NUMBERS[kind]

    def _number(self, form: str) -> int | float | bool:
        number: int | float | bool = struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))[0]
        return number

    def _string(self) -> str:
        return self._bytes(int(self._number("Q"))).decode(errors="replace")

    def _bytes(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) != count:
            raise self._error("cut short inside the header, or its header is larger than lbq reads; fetch it again")
        self._at += count
        return found

    def _error(self, text: str) -> DataError:
        return DataError(f"{self._path}: {text}")
