"""A stop string is caught wherever the pieces' borders fall, and nothing is held that need not be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbq.formats.errors import UsageError
from lbq.runtime.text.stops import StopStrings

TEXT = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple)


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the text is cut: tried letter by letter, the simplest way there is."""
    for end in range(len(text) + 1):
        cuts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if cuts:
            return min(cuts)
    return None


@given(pieces=st.lists(TEXT, max_size=8), stops=STOPS)
def test_the_same_cut_for_all_borders(pieces: list[str], stops: tuple[str, ...]) -> None:
    text = "".join(pieces)
    cut = first_stop(text, stops)
    stream = StopStrings(stops)
    shown = ""
    for i, piece in enumerate(pieces):
        shown += stream.push(piece)
        seen = "".join(pieces[: i + 1])
        if stream.stopped:
            break
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops)  # only what may still become a stop
        assert all(not seen.endswith(stop[:n]) for stop in stops for n in range(len(held) + 1, len(stop)))
    assert stream.stopped == (cut is not None)
    shown += stream.finish()
    assert shown == text[:cut]


def test_the_stop_that_is_complete_first_counts() -> None:
    for pieces in (["xabb"], ["x", "a", "b", "b"]):
        stream = StopStrings(("abb", "b"))
        assert "".join(map(stream.push, pieces)) == "xa"
    stream = StopStrings(("b", "ab"))
    assert stream.push("xab") == "x"


def test_across_pieces() -> None:
    stream = StopStrings(("</end>",))
    assert [stream.push(piece) for piece in ("a<", "/", "x", "b</en", "d> tail", "more")] == [
        "a",
        "",
        "</x",
        "b",
        "",
        "",
    ]
    assert stream.stopped
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError):
        StopStrings(("a", ""))
