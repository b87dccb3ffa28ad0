"""Where weights come from: a folder, or the Hub."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

from lbq.formats import json_file
from lbq.formats.disk import FileEntry, hash_file, readable
from lbq.formats.errors import DataError, LbqError, UsageError
from lbq.formats.front_matter import license_of, parse_card
from lbq.formats.manifest import MANIFEST, License
from lbq.formats.safetensors_file import INDEX, SINGLE, Checkpoint, open_checkpoint
from lbq.formats.tokenizer_file import TOKENIZER, check_rows, load_tokenizer, vocabulary_rows
from lbq.hub.client import OnNote, quiet
from lbq.hub.names import find_model
from lbq.hub.snapshot import Snapshot, open_snapshot
from lbq.quantizer.remote import open_remote

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
CONFIG = "config.json"
README = "README.md"
README_BYTES = 4 << 20
WEIGHTS = (SINGLE, "model-*.safetensors")


@dataclass(frozen=True)
class SourceFolder:
    """A checkpoint on disk. ``name`` is what the user called it, or the Hub id; ``label`` is its last component.

    ``remote``: the weights may be on the Hub, and the folder has all else. ``file``: they are in a GGUF file, and the
    folder, that of the model which it was made of, has all else.
    """

    folder: Path
    name: str
    revision: str | None = None
    remote: Snapshot | None = None
    file: Path | None = None

    @property
    def place(self) -> str:
        """What the user calls it on the command line, for messages: a path, or the Hub id."""
        return str(self.file or (self.folder if self.revision is None else self.name))

    @property
    def label(self) -> str:
        return self.name.rstrip("/").rpartition("/")[2]

    def companions(self) -> list[Path]:
        """Tokenizer, template, generation settings and licence files, in a fixed order."""
        named = [self.folder / name for name in COMPANIONS if (self.folder / name).is_file()]
        return named + sorted(path for pattern in LEGAL for path in self.folder.glob(pattern) if path.is_file())

    def license(self) -> License | None:
        """The licence that the README.md names, if there is one that can be read."""
        path = self.folder / README
        if not path.is_file():
            return None
        try:
            card = parse_card(json_file.read_bytes(path, README_BYTES).decode(errors="replace"), path)
        except LbqError:  # a card is for people: what is wrong with one harms no conversion
            return None
        return license_of(card.metadata)


def resolve(
    model: str | Path, revision: str | None = None, on_note: OnNote = quiet, *, weights: bool = True
) -> SourceFolder:
    """Find a model: an existing folder, else a Hub id whose files are fetched into the standard cache.

    ``revision`` is a branch, tag or commit of a Hub id, which may also end in ``@revision``. Without ``weights`` those
    of a Hub id stay where they are: :func:`open_weights` then reads their headers alone. Raises StorageError where
    there is no such folder and the name is no Hub id, RemoteError where the Hub fails, DataError for what it holds.
    """
    found = find_model(model, revision)
    if isinstance(found, Path):
        return SourceFolder(found, readable(found.resolve().name))
    return fetch_source(open_snapshot(found, on_note), weights=weights)


def fetch_source(snapshot: Snapshot, *, weights: bool = True) -> SourceFolder:
    """Fetch what a conversion reads of a repository; arguments and errors as :func:`resolve`."""
    if MANIFEST in snapshot.files:
        raise UsageError(f"{snapshot.hub_id}: an artifact, quantized already; lbq run {snapshot.hub_id}")
    if CONFIG not in snapshot.files:
        raise DataError(f"{snapshot.hub_id}: not a checkpoint (no {CONFIG}); look at its files on the Hub")
    folder = snapshot.fetch(CONFIG).parent
    for name in _matching(snapshot, (README, INDEX, *COMPANIONS, *LEGAL, *(WEIGHTS if weights else ()))):
        snapshot.fetch(name)
    return SourceFolder(folder, snapshot.hub_id.name, snapshot.commit, None if weights else snapshot)


def fetch_weights(source: SourceFolder) -> SourceFolder:
    """The same source, all of it in the cache; errors as :func:`resolve`."""
    if source.remote is None:
        return source
    for name in _matching(source.remote, WEIGHTS):
        source.remote.fetch(name)
    return replace(source, remote=None)


def open_weights(source: SourceFolder) -> Checkpoint:
    """The source's tensors, by headers alone where they are on the Hub. Raises what opening a checkpoint raises, and
    RemoteError."""
    return open_checkpoint(source.folder) if source.remote is None else open_remote(source.remote, source.folder)


def _matching(snapshot: Snapshot, patterns: Sequence[str]) -> list[str]:
    """Files at the top of a repository, in order."""
    return [n for n in sorted(snapshot.files) if "/" not in n and any(fnmatchcase(n, p) for p in patterns)]


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
