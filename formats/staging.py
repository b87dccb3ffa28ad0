"""A folder that appears whole or not at all, whenever the process is killed.

Beside a target ``NAME`` stand, while it is being written, the lock ``.NAME.lock`` and the folder ``.NAME.staging``.
Every file is written as ``FILE.part``, synced and renamed; the folder is synced, renamed to the target, and the parent
is synced. An old target is exchanged with the new one in one step (``renameat2``). On a file system that cannot do
this it first becomes ``.NAME.old``: a kill between the two renames leaves no target, and the next run puts it back.
What a killed run leaves beside the target is removed by the next run for the same target.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lbq.formats.disk import FileEntry, check_plain_name, shown, storage_errors, sync_folder, write_file
from lbq.formats.errors import BusyError, DataError, StorageError, UsageError
from lbq.formats.manifest import MANIFEST, file_names

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_target(
    target: Path, source: Path | None = None, *, overwrite: bool = False, ours: frozenset[str] = frozenset()
) -> Path:
    """Return the absolute ``target``, links followed, if an artifact made of ``source`` may be written there.

    Raises :class:`UsageError` if one contains the other, and :class:`StorageError` if the target is neither absent nor
    an empty folder (nor, with ``overwrite``, an artifact or files that are ``ours``, and nothing else), or if its
    parent cannot be written.
    """
    real = _resolve(target, source)
    if not os.path.lexists(real):
        return real
    if not real.is_dir():
        raise StorageError(f"{target}: exists and is not a folder; choose another output")
    if os.path.ismount(real):
        raise StorageError(f"{target}: a mount point; choose a folder inside it")
    with storage_errors(target):
        present = os.listdir(real)
    if not present:
        return real
    made = ours.issuperset(present)
    if not made and not (real / MANIFEST).is_file():
        raise StorageError(f"{target}: not empty and not an lbq artifact; choose another output")
    if not overwrite:
        raise StorageError(f"{target}: exists; choose another output, or --overwrite to replace it")
    if not made:
        _check_all_ours(target, real, present)
    return real


def _check_all_ours(target: Path, real: Path, present: list[str]) -> None:
    try:
        foreign = sorted(set(present) - file_names(real))
    except DataError as error:
        raise StorageError(
            f"{target}: cannot tell which files are lbq's: {error}; remove the folder, or choose another output"
        ) from None
    if foreign:
        raise StorageError(
            f"{target}: holds {shown(foreign[0])}, which lbq did not write; move it away, or choose another output"
        )


def _resolve(target: Path, source: Path | None) -> Path:
    with storage_errors(target):
        real = Path(os.path.realpath(target))
        if not real.name:
            raise UsageError(f"{target}: cannot be an output")
        if source is not None:
            origin = Path(os.path.realpath(source))
            if real.is_relative_to(origin) or origin.is_relative_to(real):
                raise UsageError(f"{target}: output and input {source} contain one another; choose another output")
        if not real.parent.is_dir():
            raise StorageError(f"{target}: {real.parent} is not a folder; make it first")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{target}: {real.parent} is not writable; choose another output")
    return real


class StagedFolder:
    """Context in which the content of ``target`` is prepared; only :meth:`commit` makes it appear.

    Construction or entry raises what :func:`check_target` raises, or :class:`BusyError` at once if another process has
    the same target. Leaving without a commit removes everything that was prepared.
    """

    def __init__(
        self, target: Path, *, overwrite: bool = False, source: Path | None = None, ours: frozenset[str] = frozenset()
    ) -> None:
        self.target = _resolve(target, source)
        self.folder = self.target.with_name(f".{self.target.name}.staging")
        self._old = self.target.with_name(f".{self.target.name}.old")
        self._lock = _lock_of(self.target)
        self._source = source
        self._overwrite, self._ours = overwrite, ours
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._descriptor = _acquire(self._lock, self.target)
        try:
            with storage_errors(self.target):
                self._clean()
                check_target(self.target, self._source, overwrite=self._overwrite, ours=self._ours)
                os.mkdir(self.folder)
        except BaseException:
            self._release()
            raise
        return self

    def path(self, name: str) -> Path:
        """Where to write the file ``name``. The writer syncs it and gives it this name only when it is whole."""
        return self.folder / check_plain_name(name, str(self.target))

    def add_file(self, name: str, content: bytes) -> FileEntry:
        """Write a small file."""
        return write_file(self.path(name), content)

    def commit(self) -> None:
        """Put the folder in the place of the target; the last step, after the manifest has been added.

        Raises what :func:`check_target` raises: the target may not be what it was on entry.
        """
        with storage_errors(self.target):
            unfinished = [name for name in os.listdir(self.folder) if name.endswith(".part")]
            assert not unfinished, f"never finished: {unfinished}"
            sync_folder(self.folder)
            check_target(self.target, self._source, overwrite=self._overwrite, ours=self._ours)
            if not self._overwrite or not self.target.is_dir() or not os.listdir(self.target):
                os.rename(self.folder, self.target)  # fails where there is more than an empty folder
            elif not exchange(self.folder, self.target):
                os.rename(self.target, self._old)
                os.rename(self.folder, self.target)
            sync_folder(self.target.parent)
            self._clean()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            with storage_errors(self.target):
                self._clean()
        except StorageError:
            if error is None:
                raise  # else the first error is the one to tell; the next run cleans up
        finally:
            self._release()

    def _clean(self) -> None:
        """Remove what stands beside the target; an old target without a successor gets its name back."""
        if os.path.lexists(self.folder):
            shutil.rmtree(self.folder)
        if os.path.lexists(self._old):
            if not os.path.lexists(self.target):
                os.rename(self._old, self.target)
                return
            os.rename(self._old, self.folder)  # a half removed folder must never be taken for an old target
            shutil.rmtree(self.folder)

    def _release(self) -> None:
        # Unlinked before it is unlocked: see _acquire.
        with suppress(OSError):
            os.unlink(self._lock)
        os.close(self._descriptor)
        self._descriptor = -1


def _acquire(lock: Path, target: Path) -> int:
    """Open and lock a file that its holders remove; whoever locked a removed one tries again."""
    with storage_errors(lock):
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    return descriptor
                os.close(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                raise _busy(target) from None
            except FileNotFoundError:
                os.close(descriptor)
            except BaseException:
                os.close(descriptor)
                raise


def check_idle(target: Path) -> None:
    """Raise :class:`BusyError` if somebody writes ``target`` at the moment; a courtesy, which locks nothing."""
    real = Path(os.path.realpath(target))
    with suppress(OSError):  # there is no lock, or none that can be looked at: taking it will tell
        descriptor = os.open(_lock_of(real), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(target) from None
        finally:
            os.close(descriptor)


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _busy(target: Path) -> BusyError:
    return BusyError(f"{target}: another lbq is writing it; wait, or choose another output")


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap names in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error))
