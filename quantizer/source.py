"""Where weights come from: a folder, or the Hub."""

from __future__ import annotations

import errno
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lbq.formats.disk import FileEntry, hash_file, readable
from lbq.formats.errors import RemoteError, StorageError, UsageError
from lbq.formats.safetensors_file import INDEX, SINGLE
from lbq.formats.tokenizer_file import TOKENIZER, check_rows, load_tokenizer, vocabulary_rows

# Files that travel with a model besides config.json and the weights.
COMPANIONS = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
WEIGHTS = (SINGLE, "model-*.safetensors", INDEX)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class SourceFolder:
    """A checkpoint on disk. ``name`` is what the user called it, or the Hub id; ``label`` is its last component."""

    folder: Path
    name: str
    revision: str | None = None

    @property
    def label(self) -> str:
        return self.name.rstrip("/").rpartition("/")[2]

    def companions(self) -> list[Path]:
        """Tokenizer, template, generation settings and licence files, in a fixed order."""
        named = [self.folder / name for name in COMPANIONS if (self.folder / name).is_file()]
        return named + sorted(path for pattern in LEGAL for path in self.folder.glob(pattern) if path.is_file())


def resolve(model: str | Path, revision: str | None = None) -> SourceFolder:
    """Find a model: an existing folder, else a Hub id whose files are fetched into the standard cache.

    Raises StorageError where there is no such folder and the name is no Hub id, RemoteError where the Hub fails.
    """
    path = Path(model)
    if path.is_dir():
        return SourceFolder(path, readable(path.resolve().name))
    name = str(model)
    if path.exists():
        raise StorageError(f"{model}: not a folder; give the folder that holds config.json")
    if not HUB_ID.fullmatch(name):
        raise StorageError(f"{model}: no such folder, and not a Hub id (owner/name)")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> SourceFolder:
    try:
        from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder
    except ModuleNotFoundError:
        raise UsageError(f"{name}: huggingface_hub is not installed; give a folder, or install lbq whole") from None
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=["config.json", *WEIGHTS, *COMPANIONS, *LEGAL]
        )
    except Exception as error:  # the client raises its own, httpx's and OSError's kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = StorageError if isinstance(error, OSError) and error.errno in DISK_FULL else RemoteError
        raise kind(f"{name}: could not be fetched from the Hub: {reason}") from error
    return SourceFolder(Path(folder), name, Path(folder).name)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise DataError for a ``tokenizer.json`` that cannot be read, or that makes ids beyond ``vocab_size``."""
    path = folder / TOKENIZER
    if not path.is_file():
        return
    check_rows(vocabulary_rows(load_tokenizer(path)), vocab_size, path)


class Hasher(threading.Thread):
    """Hashes the source's files beside the conversion: reading and sha256 leave the interpreter free."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__(daemon=True)
        self._paths = paths
        self._entries: dict[str, FileEntry] = {}
        self._error: BaseException | None = None
        self._stopped = False

    def run(self) -> None:
        try:
            for path in self._paths:
                self._entries[path.name] = hash_file(path, self._go_on)
        except BaseException as error:
            self._error = error

    def result(self) -> dict[str, FileEntry]:
        """Wait, and return size and sha256 by file name. Raises what the hashing raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._entries

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop reading, finished or not."""
        self._stopped = True
        self.join()

    def _go_on(self, count: int) -> None:
        del count
        if self._stopped:
            raise InterruptedError
