"""The YAML at the head of a model card (README.md): metadata that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lbq.formats.errors import DataError
from lbq.formats.manifest import License

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(?P<yaml>.*?)(?:^|\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """A model card: metadata in their order, and the text below them."""

    metadata: dict[str, object]
    text: str


def parse_card(content: str, where: object) -> Card:
    """Split a README.md. Raises DataError, naming ``where``, for YAML that is no mapping of names."""
    import yaml  # PyYAML, which only cards need

    found = _BLOCK.match(content)
    if found is None:
        return Card({}, content)
    try:
        metadata = yaml.safe_load(found["yaml"])
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        raise DataError(
            f"{where}: the metadata at its head are not YAML: {' '.join(str(error).split())[:200]}"
        ) from None
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise DataError(f"{where}: the metadata at its head are no mapping of names to values")
    return Card(metadata, content[found.end() :])


def license_of(metadata: Mapping[str, object]) -> License | None:
    """What a card's metadata say of the licence; None where they do not, or name several."""
    license_id, name, link = (metadata.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(license_id, str):
        return None
    return License(license_id, name if isinstance(name, str) else None, link if isinstance(link, str) else None)


def format_card(card: Card) -> str:
    """A README.md of the parts; :func:`parse_card` gives them back."""
    import yaml

    if not card.metadata:
        return card.text
    text = yaml.safe_dump(card.metadata, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n{card.text}"
