"""A text file as windows of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lbq.formats.errors import DataError, UsageError
from lbq.formats.json_file import read_bytes
from lbq.runtime.text.tokenizer import Tokenizer

PART = 1 << 18  # characters tokenized at a time, which take about 35 MB
BUNDLED_TOKENS = 4096  # of the text that ships with lbq, if nobody says how many


@dataclass(frozen=True)
class Windows:
    """Stretches of ``context`` tokens that do not overlap; the second half of each is predicted.

    A tokenizer that begins texts with special tokens has them at the start of every window, so that each is a text of
    its own to the model.
    """

    prefix: list[int]
    ids: list[int]  # a whole number of windows, without prefixes
    context: int

    @property
    def _step(self) -> int:
        return self.context - len(self.prefix)

    @property
    def first(self) -> int:
        """The first token of a window that is predicted: it and the ones behind have half a window before them."""
        return self.context // 2

    def __len__(self) -> int:
        return len(self.ids) // self._step

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.ids), self._step):
            yield self.prefix + self.ids[start : start + self._step]

    @property
    def positions(self) -> int:
        """Tokens that are predicted."""
        return len(self) * (self.context - self.first)


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 file that was read."""

    path: Path
    text: str
    sha256: str


def read_text(path: Path) -> TextFile:
    """Raises StorageError where ``path`` cannot be read, DataError for what is not UTF-8 or past 64 MiB."""
    data = read_bytes(path)
    try:
        return TextFile(path, data.decode(), hashlib.sha256(data).hexdigest())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; --text takes plain text") from None


def bundled_text() -> TextFile:
    """The English text that ships with lbq, for whoever gives none: about 20,000 tokens.

    Excerpts of State of the Union addresses and of Moby-Dick, in the public domain (``scripts/make_report_text.py``).
    """
    file = read_text(Path(__file__).with_name("english.txt"))
    return replace(file, path=Path("lbq:english.txt"))


def text_to_read(text: Path | str | None, max_tokens: int | None) -> tuple[TextFile, int | None]:
    """The file that somebody names, or else the one that ships with lbq and BUNDLED_TOKENS of it; and how many tokens.

    Raises what :func:`read_text` raises.
    """
    if text is not None:
        return read_text(Path(text)), max_tokens
    return bundled_text(), BUNDLED_TOKENS if max_tokens is None else max_tokens


def cut(file: TextFile, tokenizers: Sequence[Tokenizer], context: int, max_tokens: int | None) -> Windows:
    """Whole windows from the start of the text, ``max_tokens`` tokens at most; what is left over is not used.

    Raises DataError where the tokenizers differ on this text or the text does not fill a window, UsageError where
    ``max_tokens`` or ``context`` is too short for one.
    """
    tokenizer, *others = tokenizers
    prefix = _prefix(tokenizer)
    step = context - len(prefix)
    if step <= context // 2:
        raise UsageError(f"context {context}: too short, the tokenizer begins texts with {len(prefix)} tokens")
    if max_tokens is not None and max_tokens < step:
        raise UsageError(f"{max_tokens} tokens at most: a window has {step}; take more tokens or a shorter context")
    ids = _encode(tokenizer, file.text, max_tokens)
    if any(prefix != _prefix(other) or ids != _encode(other, file.text, max_tokens) for other in others):
        raise DataError(f"{file.path}: the models' tokenizers make different tokens of it; compare like with like")
    if len(ids) < step:
        what = f"{len(ids)} tokens, and a window takes {step}; give a longer text or a shorter context"
        raise DataError(f"{file.path}: {what if ids else 'the text is empty'}")
    return Windows(prefix, ids[: len(ids) // step * step], context)


def _encode(tokenizer: Tokenizer, text: str, most: int | None) -> list[int]:
    """The first ``most`` tokens of ``text``, part by part: memory and time are those of the tokens that are wanted."""
    ids: list[int] = []
    for part in _parts(text):
        ids += tokenizer.encode(part, add_special_tokens=False)
        if most is not None and len(ids) >= most:
            return ids[:most]
    return ids


def _parts(text: str) -> Iterator[str]:
    """Up to PART characters at a time, each to the end of a line where one ends in its second half, else of a word: a
    token is seldom cut, and where they are cut does not depend on how many are wanted."""
    start = 0
    while start < len(text):
        stop = start + PART
        if stop < len(text):
            ends = (text.rfind(mark, start + PART // 2, stop) + 1 for mark in ("\n", " "))
            stop = next((end for end in ends if end), stop)
        yield text[start:stop]
        start = stop


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    whole, bare = (tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]
