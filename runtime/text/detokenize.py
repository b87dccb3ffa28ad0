"""Tokens to text, one token at a time and without ever showing part of a character.

``tokenizers`` decodes whole sequences only: its byte-fallback decoder turns a run of bytes into U+FFFDs, one a byte,
when any of them is bad, so that what a stream has shown already could change afterwards. Here a token becomes bytes by
itself and one incremental UTF-8 decoder joins them. On well-formed text both agree.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import tokenizers

from lbq.formats.errors import DataError
from lbq.formats.json_file import decode


class _ByteLevel(msgspec.Struct, tag_field="type", tag="ByteLevel"):
    pass


class _Metaspace(msgspec.Struct, tag_field="type", tag="Metaspace"):
    replacement: str
    prepend_scheme: Literal["always", "first", "never"] = "always"


class _Pattern(msgspec.Struct, forbid_unknown_fields=True):
    text: str = msgspec.field(name="String")


class _Replace(msgspec.Struct, tag_field="type", tag="Replace"):
    pattern: _Pattern
    content: str


class _ByteFallback(msgspec.Struct, tag_field="type", tag="ByteFallback"):
    pass


class _Fuse(msgspec.Struct, tag_field="type", tag="Fuse"):
    pass


class _Strip(msgspec.Struct, tag_field="type", tag="Strip"):
    content: str
    start: int
    stop: Literal[0]  # what is cut from the end of a text is not known while it streams


_Step = _ByteLevel | _Metaspace | _Replace | _ByteFallback | _Fuse | _Strip


class _Sequence(msgspec.Struct, tag_field="type", tag="Sequence"):
    decoders: list[_Step]


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in GPT-2's byte-level vocabularies (Radford et al. 2019).

    A byte that prints in Latin-1 is its own character; the others follow from U+0100 on, in order.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKENS = {text: bytes((byte,)) for byte in range(256) for text in (f"<0x{byte:02X}>", f"<0x{byte:02x}>")}


@dataclass(frozen=True)
class Detokenizer:
    """How each token of one vocabulary becomes bytes."""

    backend: tokenizers.Tokenizer
    added: frozenset[int]  # ids whose text is what it says, in whatever alphabet the vocabulary is
    skipped: frozenset[int]  # ids of special tokens: no text
    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    dropped_at_start: str  # removed from the first token wherever it occurs (the Metaspace decoder's rule)
    strip: tuple[str, int]  # a character and how many of it are cut from the start of a text
    _cache: dict[int, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def read(
        cls, backend: tokenizers.Tokenizer, *, added: frozenset[int], skipped: frozenset[int], where: str
    ) -> Detokenizer:
        """Understand the ``decoder`` of a tokenizer.json; DataError if it is not of a kind that can be streamed."""
        where = f"{where}: decoder"
        if backend.decoder is None:
            raise DataError(f"{where}: none; lbq reads ByteLevel, Metaspace and SentencePiece-like decoders")
        steps = _parse(backend.decoder.__getstate__(), where)
        kinds = {type(step) for step in steps}
        replacements, dropped, strip = [], "", (" ", 0)
        for step in steps:
            if isinstance(step, _Replace):
                replacements.append((step.pattern.text, step.content))
            elif isinstance(step, _Metaspace):
                replacements.append((step.replacement, " "))
                dropped = "" if step.prepend_scheme == "never" else step.replacement
            elif isinstance(step, _Strip):
                strip = (step.content, step.start)
        return cls(
            backend=backend,
            added=added,
            skipped=skipped,
            byte_level=_ByteLevel in kinds,
            byte_fallback=_ByteFallback in kinds,
            replacements=tuple(replacements),
            dropped_at_start=dropped,
            strip=strip,
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token within a text; none for special tokens and for ids outside the vocabulary."""
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._compute(token, first=False)
        return found

    def first_bytes(self, token: int) -> bytes:
        """The bytes of a token that begins a text."""
        return self._compute(token, first=True) if self.dropped_at_start else self.token_bytes(token)

    def _compute(self, token: int, *, first: bool) -> bytes:
        text = None if token in self.skipped else self.backend.id_to_token(token)
        if text is None:
            return b""
        if self.byte_level:
            if token not in self.added and all(character in _BYTE_OF for character in text):
                return bytes(_BYTE_OF[character] for character in text)
            return text.encode()
        if first and self.dropped_at_start:
            text = text.replace(self.dropped_at_start, "")
        for pattern, replacement in self.replacements:
            text = text.replace(pattern, replacement)
        byte = _BYTE_TOKENS.get(text) if self.byte_fallback else None
        return text.encode() if byte is None else byte


def _parse(state: bytes, where: str) -> list[_Step]:
    """The steps of a decoder, if it is one of three kinds: ByteLevel; Metaspace; Replace* ByteFallback? (Fuse Strip?)?.

    The order matters: Strip is about the whole text after Fuse, and about each token without it.
    """
    parsed = decode(state, _Sequence | _Step, where)  # type: ignore[arg-type]
    steps = parsed.decoders if isinstance(parsed, _Sequence) else [parsed]
    names = " ".join(type(step).__name__[1:] for step in steps)
    if not re.fullmatch("ByteLevel|Metaspace|(Replace ?)*(ByteFallback ?)?(Fuse ?(Strip)?)?", names):
        raise DataError(f"{where}: {names}: this order of steps is not one that lbq can stream")
    return steps


class StreamDecoder:
    """One text that arrives token by token: each push gives the characters that it completes.

    Special tokens give nothing. Bytes that are no UTF-8 become U+FFFD once that is certain; bytes that may yet become
    a character are held back, and if the text ends there they are left out, because nobody wrote half a character.
    ``continues_text`` keeps a leading space that would be cut at the start of a text: set it when the text goes on
    after a prompt and is shown together with it.
    """

    def __init__(self, detokenizer: Detokenizer, *, continues_text: bool = False) -> None:
        self._detokenizer = detokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip, count = detokenizer.strip
        self._strips_left = 0 if continues_text else count
        self._at_start = not continues_text

    def push(self, token: int) -> str:
        """The text that ``token`` completes, often empty."""
        if self._at_start and token not in self._detokenizer.skipped:
            self._at_start = False
            data = self._detokenizer.first_bytes(token)
        else:
            data = self._detokenizer.token_bytes(token)
        text = self._utf8.decode(data)
        while self._strips_left and text:
            if not text.startswith(self._strip):
                self._strips_left = 0
                break
            text = text[len(self._strip) :]
            self._strips_left -= 1
        return text
