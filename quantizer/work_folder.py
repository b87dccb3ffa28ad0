"""What a conversion that takes long keeps beside its target, so that it survives a kill at any moment.

The target ``NAME`` has it in ``.NAME.SUFFIX``, protected by the target's lock. One file, the head, says what the work
is of: it is written before anything else and removed before anything else, so that without it there is nothing to go on
with.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, TypeVar

from lbq.formats import json_file
from lbq.formats.disk import shown, storage_errors, sync_folder
from lbq.formats.errors import DataError, StorageError, UsageError

KEPT = "what is finished is kept, and the same command goes on with it"  # for errors that are not the data's

T = TypeVar("T")
Layers = dict[str, tuple[int, int, int]]  # of each quantised layer: bits, group as searched, group as stored


class WorkFolder:
    """A folder of one kind of work. Its user holds the target's lock."""

    SUFFIX: ClassVar[str]
    HEAD: ClassVar[str]
    OTHERS: ClassVar[re.Pattern[str]]  # names of all other files
    LASTING: ClassVar[str]  # pattern of the files that another run goes on with

    def __init__(self, target: Path) -> None:
        """``target`` may not exist."""
        self.folder = target.with_name(f".{target.name}.{self.SUFFIX}")

    @property
    def exists(self) -> bool:
        """Whether there is such a folder, with whatever in it."""
        return self.folder.is_dir()

    @property
    def begun(self) -> bool:
        """Whether there is work to go on with."""
        return (self.folder / self.HEAD).is_file()

    def head(self, kind: type[T], *, restart: bool) -> T | None:
        """The head of work that is there; None where there is none. ``restart`` drops what is there.

        Raises StorageError for a folder that is not lbq's or a disk that refuses, DataError for a head that cannot be
        read.
        """
        if not os.path.lexists(self.folder):
            return None
        self._check_ours()
        if restart or not self.begun:
            self.remove()
            return None
        try:
            return json_file.read(self.folder / self.HEAD, kind)
        except (DataError, StorageError) as error:
            raise DataError(f"{error}; --restart drops this work") from None

    def refusal(self, differences: list[str]) -> UsageError:
        """What to raise for work of another conversion."""
        return UsageError(
            f"{self.folder}: unfinished work of another conversion: {'; '.join(differences[:3])}; "
            "repeat that command to finish it, choose another output, or drop it with --restart"
        )

    def _check_ours(self) -> None:
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise StorageError(f"{self.folder}: not a folder of lbq's; move it away")
        with storage_errors(self.folder):
            present = sorted(os.listdir(self.folder))
        for name in present:
            whole = name.removesuffix(".part")
            if whole != self.HEAD and not self.OTHERS.fullmatch(whole):
                raise StorageError(f"{self.folder}: holds {shown(name)}, which lbq did not write; move it away")

    def sync(self) -> None:
        """Make names durable."""
        with storage_errors(self.folder):
            sync_folder(self.folder)

    def nbytes(self) -> int:
        """Bytes on the disk of what another run goes on with."""
        total = 0
        for path in self.folder.rglob(self.LASTING):
            with suppress(FileNotFoundError):  # who holds the lock may be at work
                total += path.stat().st_blocks * 512
        return total

    def remove(self) -> None:
        """Remove the folder, the head first."""
        with storage_errors(self.folder):
            (self.folder / self.HEAD).unlink(missing_ok=True)
            sync_folder(self.folder)
            shutil.rmtree(self.folder)


def layer_differences(then: Layers, now: Layers) -> Iterator[str]:
    """The first layer that differs, in words."""
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name} {_scheme(then.get(name))}, now {_scheme(now.get(name))}"
            break


def tool_differences(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Versions that differ, in words."""
    for tool in sorted(then.keys() | now.keys()):
        if then.get(tool) != now.get(tool):
            yield f"{tool} {then.get(tool)}, now {now.get(tool)}"


def _scheme(layer: tuple[int, int, int] | None) -> str:
    return "BF16" if layer is None else f"INT{layer[0]} in groups of {layer[2]}"
