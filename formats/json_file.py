"""JSON that is decoded into typed structs or refused, and encoded to the same bytes every time."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TypeVar

import msgspec

from lbq.formats.errors import DataError, StorageError
from lbq.formats.unique_keys import check_unique_keys

T = TypeVar("T")

MAX_BYTES = 64 << 20  # a manifest of a thousand layers is a few megabytes


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The file's bytes. Raises DataError past ``limit`` bytes, StorageError where it cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StorageError(f"{path}: not a file")  # opening a pipe would wait for a writer
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise DataError(f"{path}: larger than {limit} bytes: this is not a file lbq reads")
    return data


def decode(data: bytes, kind: type[T], where: object) -> T:
    """Decode strictly into ``kind``; DataError names ``where`` and the field, or a key that an object has twice."""
    value = decode_last(data, kind, where)
    check_unique_keys(data, where)
    return value


def decode_last(data: bytes, kind: type[T], where: object) -> T:
    """:func:`decode` for text whose keys are checked elsewhere: of equal keys the last counts."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {error}") from None


def read(path: Path, kind: type[T], limit: int = MAX_BYTES) -> T:
    """Read and decode a JSON file: :func:`read_bytes`, then :func:`decode`."""
    return decode(read_bytes(path, limit), kind, path)


def encode(value: object) -> bytes:
    """Indented JSON with a final newline; the same value gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
