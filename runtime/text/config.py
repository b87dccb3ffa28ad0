"""The text files beside the weights, decoded once: ``tokenizer_config.json`` and ``special_tokens_map.json``.

Only what the runtime uses is read. Whatever else these files hold (tokenizer classes, ``auto_map``) is ignored:
nothing in them is ever imported or run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from lbq.formats.json_file import decode, read_bytes

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"


class AddedTokenEntry(msgspec.Struct, frozen=True):
    """A token added to the vocabulary; ``normalized`` is the contrary of ``special`` where it is not said."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    special: bool = False


class NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


TokenEntry = str | AddedTokenEntry
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerConfig(msgspec.Struct, frozen=True):
    """What is used of ``tokenizer_config.json``; every field may be absent."""

    bos_token: TokenEntry | None = None
    eos_token: TokenEntry | None = None
    unk_token: TokenEntry | None = None
    sep_token: TokenEntry | None = None
    pad_token: TokenEntry | None = None
    cls_token: TokenEntry | None = None
    mask_token: TokenEntry | None = None
    additional_special_tokens: list[TokenEntry] | None = None
    extra_special_tokens: list[TokenEntry] | dict[str, TokenEntry] | None = None
    added_tokens_decoder: dict[TokenId, AddedTokenEntry] | None = None
    chat_template: str | list[NamedTemplate] | None = None

    def special_tokens(self) -> dict[str, str]:
        """The text of each named special token there is, by its name in a chat template (``bos_token``, …)."""
        entries = ((name, getattr(self, name)) for name in SPECIAL_NAMES)
        return {name: content(entry) for name, entry in entries if entry is not None}

    def all_special(self) -> list[str]:
        """The text of every special token, named or not, each once."""
        extra = self.extra_special_tokens or []
        more = [*(self.additional_special_tokens or []), *(extra.values() if isinstance(extra, dict) else extra)]
        return list(dict.fromkeys([*self.special_tokens().values(), *map(content, more)]))


def content(entry: TokenEntry) -> str:
    return entry if isinstance(entry, str) else entry.content


def load_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read ``tokenizer_config.json``, and where it is of the old kind also ``special_tokens_map.json``.

    Absent files count as empty. Raises DataError for content that is not as described above, StorageError when a
    file cannot be read.
    """
    config = _decode_optional(folder / TOKENIZER_CONFIG)
    if config.added_tokens_decoder is not None:
        return config
    # Before added_tokens_decoder existed the second file had the last word; transformers reads it the same way.
    old = _decode_optional(folder / SPECIAL_TOKENS_MAP)
    names = (*SPECIAL_NAMES, "additional_special_tokens", "extra_special_tokens")
    said = {name: value for name in names if (value := getattr(old, name)) is not None}
    return msgspec.structs.replace(config, **said)


def read_optional(path: Path) -> bytes | None:
    """The bytes of a file, or None if there is none; DataError past 64 MiB, StorageError if it cannot be read."""
    return read_bytes(path) if path.exists() else None


def _decode_optional(path: Path) -> TokenizerConfig:
    data = read_optional(path)
    return TokenizerConfig() if data is None else decode(data, TokenizerConfig, path)
