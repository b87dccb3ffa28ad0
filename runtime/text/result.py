"""What generating gives: pieces of a text as they come, or the whole of it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from lbq.formats.errors import DataError
from lbq.runtime.text.generation import Finish
from lbq.runtime.text.sampling import BrokenLogitsError


@dataclass(frozen=True)
class Result:
    """A generated text and how it ended.

    ``error``: what ended it before its time, where it was one of several texts and the others went on; ``text`` is what
    there was until then, and ``finish.reason`` is "error".
    """

    text: str
    finish: Finish
    error: DataError | None = None


class TextStream(Iterator[str]):
    """Pieces of a text as they come; ``finish`` is set after the last, also where an error ends the text."""

    def __init__(self, items: Generator[str | Finish, None, None]) -> None:
        self._items = items
        self.finish: Finish | None = None

    def __next__(self) -> str:
        for item in self._items:
            if isinstance(item, str):
                return item
            self.finish = item
        raise StopIteration

    def close(self) -> None:
        """Stop before the end."""
        self._items.close()

    def result(self) -> Result:
        """The whole text, of a stream that was not read yet; broken logits that end it are its ``error``."""
        pieces: list[str] = []
        error = None
        try:
            for piece in self:
                pieces.append(piece)  # noqa: PERF402  what there is when it raises is kept
        except BrokenLogitsError as raised:
            error = raised
        assert self.finish is not None
        return Result("".join(pieces), self.finish, error)
