"""The few disk operations that have to be exact: errors that say what to do, syncs, hashes, plain file names."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Final

import msgspec

from lbq.formats.errors import DataError, StorageError

BLOCK = 16 << 20  # bytes handled at a time: large enough for full disk speed, small beside any tensor that matters
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file: its size in bytes and the sha256 of its content in hexadecimal. Also part of the manifest."""

    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@contextmanager
def storage_errors(path: Path, need: int | None = None) -> Iterator[None]:
    """Turn any :class:`OSError` inside into a :class:`StorageError` that names ``path``.

    ``need`` is the number of bytes being written; a full disk is reported with it and with the bytes free.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            needed = "" if need is None else f"{need} bytes needed, "
            reason += f" ({needed}{free_bytes(path)} bytes free); free some space or choose another folder"
        raise StorageError(f"{path}: {reason}") from error


def free_bytes(path: Path) -> int:
    """Bytes an unprivileged process may still write to the file system of ``path`` (which need not exist yet)."""
    here = path.absolute()
    while True:
        try:
            usage = os.statvfs(here)
        except OSError:
            if here == here.parent:
                return 0
            here = here.parent
        else:
            return usage.f_bavail * usage.f_frsize


SPARE_BYTES: Final = 64 << 20  # for small files and headers, on top of the tensors of what is written


def require_space(path: Path, nbytes: int) -> None:
    """Raise :class:`StorageError` unless ``nbytes`` bytes are free where ``path`` will be."""
    free = free_bytes(path)
    if free < nbytes:
        raise StorageError(
            f"{path}: disk too full: {nbytes} bytes needed, {free} bytes free; free some space or choose another folder"
        )


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` (bytes) at ``offset``; the kernel may take it in pieces."""
    while data:
        count = os.pwrite(descriptor, data[:BLOCK], offset)
        data, offset = data[count:], offset + count


def write_file(path: Path, content: bytes) -> FileEntry:
    """Write a small file, which appears whole and synced or not at all; it takes the place of a file that is there."""
    part = path.with_name(f"{path.name}.part")
    with storage_errors(path, len(content)):
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            try:
                write_at(descriptor, memoryview(content), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> FileEntry:
    """Size and sha256 of a file, read block by block; ``on_bytes`` hears of every block."""
    digest, size = hashlib.sha256(), 0
    with storage_errors(path), path.open("rb", buffering=0) as file:
        block = bytearray(1 << 20)
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
            if on_bytes:
                on_bytes(count)
    return FileEntry(size, digest.hexdigest())


def check_plain_name(name: str, where: str) -> str:
    """Return ``name`` if it is the name of a file in the same folder and nothing else.

    Names come from indexes, manifests and the Hub; ``where`` says which in the :class:`DataError` that refuses
    separators of any system, drives, ``..``, control characters and names a file system would not take.
    """
    bad = name in ("", ".", "..") or any(c in '/\\:*?"<>|' or not c.isprintable() for c in name)
    if bad or len(name.encode("utf-8", "surrogatepass")) > 255:
        raise DataError(f"{where}: {shown(name)} is not a plain file name; the file is broken or hostile")
    return name


def readable(path: Path | str) -> str:
    """A path as text that JSON can hold: bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")


def shown(name: str) -> str:
    """``name`` quoted for a message: one line, escaped, of bounded length."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def listed(names: list[str]) -> str:
    """The first few of ``names`` for a message, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shown(name) for name in names[:5]) + more
