"""What is compared: models by name, and the windows of a text that all of them read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lbq.evaluation.windows import TextFile, Windows, cut
from lbq.formats.artifact import Artifact, open_artifact
from lbq.formats.disk import readable
from lbq.formats.errors import UsageError
from lbq.formats.manifest import MANIFEST
from lbq.formats.quality import Text
from lbq.formats.spec import ModelSpec
from lbq.hub.artifacts import fetch_artifact
from lbq.hub.client import OnNote, quiet
from lbq.hub.names import HubId, find_model
from lbq.hub.snapshot import open_snapshot
from lbq.quantizer.foreign import ForeignCheckpoint, open_foreign
from lbq.quantizer.original import Original, open_original
from lbq.quantizer.source import SourceFolder, fetch_source, resolve
from lbq.runtime.text.tokenizer import Tokenizer

CONTEXT = 512  # tokens of a window, unless the models were made for fewer
SHORTEST = 4
GGUF = ".gguf"


class Reader(Protocol):
    """What reads a text: an artifact, an original, a conversion that has been prepared."""

    @property
    def folder(self) -> Path:
        """Where its tokenizer is."""
        ...

    @property
    def spec(self) -> ModelSpec: ...


def open_model(model: Path | str, on_note: OnNote = quiet) -> Artifact | Original:
    """Open an artifact or a checkpoint, a folder or a Hub id; to be closed. Raises what finding and opening raise."""
    found = _find(model, on_note)
    return open_artifact(found) if isinstance(found, Path) else open_original(found)


def open_stored(model: Path | str, on_note: OnNote = quiet) -> Artifact | ForeignCheckpoint:
    """As :func:`open_model`, but a checkpoint is opened as another tool left it, quantised or not; or a GGUF file."""
    path = Path(model)
    if path.suffix == GGUF and path.is_file():
        return open_foreign(SourceFolder(path, path.name))
    found = _find(model, on_note)
    return open_artifact(found) if isinstance(found, Path) else open_foreign(found)


def _find(model: Path | str, on_note: OnNote) -> Path | SourceFolder:
    """An artifact's folder, or a checkpoint."""
    if not str(model):
        raise UsageError("no model: give a folder or a Hub id")
    found = find_model(model)
    if isinstance(found, HubId):
        snapshot = open_snapshot(found, on_note)
        return fetch_artifact(snapshot) if MANIFEST in snapshot.files else fetch_source(snapshot)
    return found if (found / MANIFEST).is_file() else resolve(found)


def windows_of(file: TextFile, models: Sequence[Reader], context: int | None, max_tokens: int | None) -> Windows:
    """Cut a text for models that read it together, in windows of ``context`` tokens (None: CONTEXT, or what they take).

    Raises UsageError for a context that they do not take, and what :func:`lbq.evaluation.windows.cut` raises.
    """
    if max_tokens is not None and not isinstance(max_tokens, int):
        raise UsageError(f"max_tokens {max_tokens!r}: a whole number is needed")
    most = min(model.spec.context for model in models)
    if context is None:
        context = min(CONTEXT, most)
    if not (isinstance(context, int) and SHORTEST <= context <= most):
        raise UsageError(f"context {context}: these models take {SHORTEST} to {most} tokens")
    return cut(file, [_tokenizer(model) for model in models], context, max_tokens)


def text_of(file: TextFile, windows: Windows, path: Path | str | None = None) -> Text:
    """What a report says of the text that was read; ``path`` is what it calls the file, if not by its path."""
    name = readable(file.path if path is None else path)
    return Text(name, file.sha256, len(windows.ids), windows.context, len(windows), windows.positions)


def _tokenizer(model: Reader) -> Tokenizer:
    tokenizer = Tokenizer.load(model.folder)
    tokenizer.check_vocabulary(model.spec.vocab_size)
    return tokenizer
