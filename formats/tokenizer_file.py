"""``tokenizer.json`` as the ``tokenizers`` library reads it, kept from taking the process with it.

The library is Rust: on some content it panics, and its binding raises that as a BaseException; on other content (seen
with 0.23) it makes a string that is not UTF-8 and then ends the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lbq.formats import json_file
from lbq.formats.disk import shown
from lbq.formats.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


class _Prefix(msgspec.Struct):
    continuing_subword_prefix: str | None = None


class _Merges(msgspec.Struct):
    merges: list[str | tuple[str, str]] = []  # "left right", or the two


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises DataError for content that the library refuses or does not survive, StorageError where it cannot be read.
    """
    from tokenizers import Tokenizer  # slow to import

    content = _checked(json_file.read_bytes(path), path)
    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:  # ValueError, plain Exception for some content, and the binding's PanicException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{path}: {' '.join(str(error).split())[:300]}") from None


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """The largest token id plus one: the rows that an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def check_rows(rows: int, vocab_size: int, where: object) -> None:
    """Raise DataError if a tokenizer of ``rows`` makes ids for which a model of ``vocab_size`` has no embedding."""
    if rows > vocab_size:
        raise DataError(
            f"{where}: token ids go up to {rows - 1} but the model has {vocab_size} embedding rows; "
            "this tokenizer belongs to another model"
        )


def _checked(data: bytes, path: Path) -> bytes:
    """The content, where it is safe to load. Encoded anew, so that a key twice cannot hide something from the check."""
    fields = json_file.decode_last(data, dict[str, msgspec.Raw], path)
    if "model" not in fields:
        raise DataError(f"{path}: no model")
    model = json_file.decode_last(bytes(fields["model"]), dict[str, msgspec.Raw], f"{path}: model")
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    _check_merges(bytes(fields["model"]), path)
    return msgspec.json.encode(fields)


def _check_merges(model: bytes, path: Path) -> None:
    """Merging, the library cuts as many bytes as the prefix has off the right part, whatever they are."""
    prefix = json_file.decode_last(model, _Prefix, f"{path}: model").continuing_subword_prefix
    if not prefix:
        return
    for merge in json_file.decode_last(model, _Merges, f"{path}: model").merges:
        right = merge.partition(" ")[2] if isinstance(merge, str) else merge[1]
        if not right.startswith(prefix):
            raise DataError(
                f"{path}: a merge joins {shown(right)}, which does not begin with continuing_subword_prefix "
                f"{shown(prefix)}; fetch the tokenizer again"
            )
