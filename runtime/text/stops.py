"""Stop strings over streamed text."""

from __future__ import annotations

from lbq.formats.errors import UsageError


class StopStrings:
    """Cuts a stream of text pieces before the first stop string, wherever the pieces' borders fall.

    "First" is the one that is complete first; of two that end together, the longer. So the result does not depend on
    how the text was cut into pieces. Text that may be the beginning of a stop string is held back, all else is given
    out at once.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        """UsageError for what is no string, and for an empty one: it would stop everything."""
        odd = next((stop for stop in stops if not isinstance(stop, str)), None)
        if odd is not None:
            raise UsageError(f"a stop string is {odd!r}: it must be text")
        if not all(stops):
            raise UsageError("a stop string is empty")
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is certain after ``piece``; once ``stopped`` is set, there is nothing more to come."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, at the end of a text that no stop string ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
