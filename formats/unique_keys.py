"""JSON objects with a key twice, which decoders accept in silence."""

from __future__ import annotations

import json
import re
from typing import Any

from lbq.formats.disk import shown
from lbq.formats.errors import DataError

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"([ \t\r\n]*+:)?')


def check_unique_keys(data: bytes, kept: int, where: str) -> None:
    """Refuse valid JSON in which an object has a key twice; ``kept`` is the number of keys that the decoder returned.

    A decoder keeps the last of equal keys, so that two readers may see two different files. Counting the keys costs
    far less memory than decoding once more into pairs.
    """
    if sum(match[1] is not None for match in _STRING.finditer(data)) == kept:
        return

    def refuse(items: list[tuple[str, Any]]) -> None:
        keys: set[str] = set()
        for key, _ in items:
            if key in keys:
                raise DataError(f"{where}: {shown(key)} appears twice")
            keys.add(key)

    json.loads(data, object_pairs_hook=refuse, parse_int=len)
    raise AssertionError("the decoder lost a key")
