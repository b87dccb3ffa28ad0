"""The metadata at the head of a model card."""

from __future__ import annotations

import pytest

from lbq.formats.errors import DataError
from lbq.formats.front_matter import Card, format_card, license_of, parse_card
from lbq.formats.manifest import License


@pytest.mark.parametrize(
    ("content", "card"),
    [
        ("", Card({}, "")),
        ("# Title\n---\na: b\n---\n", Card({}, "# Title\n---\na: b\n---\n")),
        ("---\na: b\n---\n# Title\n", Card({"a": "b"}, "# Title\n")),
        ("---\r\na: b\r\n---\r\ntext", Card({"a": "b"}, "text")),
        ("\n---\ntags:\n- é\n- x\n---", Card({"tags": ["é", "x"]}, "")),
        ("---\n---\ntext", Card({}, "text")),
        ("---\na: '---'\nb: 1\n---\ntext\n---\nmore", Card({"a": "---", "b": 1}, "text\n---\nmore")),
        ("---\nnever ends\n", Card({}, "---\nnever ends\n")),
    ],
)
def test_parts(content: str, card: Card) -> None:
    assert parse_card(content, "README.md") == card
    assert parse_card(format_card(card), "README.md") == card


@pytest.mark.parametrize(
    "yaml", ["a: [", "- a", "text", "1: a", "a: !!python/object:os.system x", "a: 2024-13-45", "[" * 9999]
)
def test_what_is_no_metadata(yaml: str) -> None:
    with pytest.raises(DataError, match=r"README\.md: the metadata at its head"):
        parse_card(f"---\n{yaml}\n---\n", "README.md")


def test_order_and_letters_stay() -> None:
    text = "---\nzebra: ü\nalpha:\n- 1\n---\nText\n"
    assert format_card(parse_card(text, "")) == text


def test_licences() -> None:
    assert license_of({"license": "apache-2.0"}) == License("apache-2.0")
    assert license_of({"license": "other", "license_name": "llama", "license_link": 7}) == License("other", "llama")
    assert license_of({"license": ["mit", "apache-2.0"]}) is None
    assert license_of({}) is None
