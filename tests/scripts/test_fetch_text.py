"""Prose out of MediaWiki markup."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LONG = "A sentence that is long enough to be kept as prose, since a shorter one would be taken for a caption or a list."


@pytest.fixture
def fetch_text() -> Iterator[Any]:
    scripts = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, scripts)
    yield importlib.import_module("fetch_text")
    sys.path.remove(scripts)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic''.", "Bold and italic."),
        ("[[Paris|The city]] in [[France]].", "The city in France."),
        ("[[Image:a.png|thumb|A [[cat]] here]]Seen.", "Seen."),
        ("{{Infobox|a={{b|c}}\n|d=e}}Seen.", "Seen."),
        ("{| class=x\n| cell\n|}Seen.", "Seen."),
        ("Fact&lt;ref name=&quot;a&quot;&gt;A book&lt;/ref&gt; &amp;amp; figure.", "Fact & figure."),
        ("&lt;!-- hidden --&gt;Seen.", "Seen."),
        ("A [http://example.org page] there.", "A page there."),
    ],
)
def test_markup_is_removed(fetch_text: Any, markup: str, text: str) -> None:
    assert fetch_text.prose(f"{markup} {LONG}") == f"{text} {LONG}"


@pytest.mark.parametrize("line", ["== Heading ==", "* an item", "Short.", "[[Category:Things]]", "[[de:Ding]]"])
def test_what_is_not_prose_is_left_out(fetch_text: Any, line: str) -> None:
    assert fetch_text.prose(f"{line}\n{LONG}\n\n{LONG}") == f"{LONG}\n\n{LONG}"


def test_fetch_splits_by_article(fetch_text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "\n".join([LONG] * 6)
    pages = [f"<page><title>T{i}</title><text xml:space='preserve'>{body}</text></page>" for i in range(20)]
    pages.insert(3, "<page><title>R</title><text>#REDIRECT [[T1]]</text></page>")
    pages.insert(4, f"<page><title>Talk:T1</title><text>{body}</text></page>")
    data = gzip.compress("".join(pages).encode())
    sdist = tmp_path / fetch_text.PACKAGE.file
    with tarfile.open(sdist, "w:gz") as archive:
        member = tarfile.TarInfo("infini_transformer_pytorch-0.2.1/data/enwik8.gz")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    sha256 = hashlib.sha256(sdist.read_bytes()).hexdigest()
    package = type(fetch_text.PACKAGE)("pypi", "x==1", sdist.name, sha256)
    monkeypatch.setattr(fetch_text, "PACKAGE", package)
    out = tmp_path / "text"
    assert fetch_text.fetch(out, sdist)
    titles = {
        name: [article["text"].split("\n")[0] for article in json.loads((out / f"{name}.json").read_text())]
        for name in ("train", "heldout")
    }
    assert titles["heldout"] == ["T0", "T10"]
    assert sorted(titles["train"] + titles["heldout"]) == sorted(f"T{i}" for i in range(20))
    assert not fetch_text.fetch(out)
