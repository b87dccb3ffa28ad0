"""JSON objects with a key twice, which decoders accept in silence."""

from __future__ import annotations

import json
import re

from lbq.formats.disk import shown
from lbq.formats.errors import DataError

_TOKEN = re.compile(rb'[{}]|("(?:[^"\\]++|\\.)*+")([ \t\r\n]*+:)?', re.DOTALL)


def check_unique_keys(data: bytes, where: object) -> None:
    """Refuse valid JSON in which an object, however deep, has a key twice.

    A decoder keeps the last of equal keys, so that two readers may see two different files. Here the text is read once
    more without being decoded: that takes no recursion, and memory only for the keys of the objects that are open.
    """
    objects: list[set[str]] = []
    for token in _TOKEN.finditer(data):
        string, colon = token.groups()
        if colon:
            key = _decoded(string)
            if key in objects[-1]:
                raise DataError(f"{where}: {shown(key)} appears twice")
            objects[-1].add(key)
        elif string is None:
            objects.append(set()) if token[0] == b"{" else objects.pop()


def _decoded(string: bytes) -> str:
    text = string.decode(errors="replace")  # msgspec lets bad UTF-8 pass in what it skips
    return str(json.loads(text)) if "\\" in text else text[1:-1]
