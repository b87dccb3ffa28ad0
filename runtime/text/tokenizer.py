"""Text to token ids and back, from ``tokenizer.json`` by the ``tokenizers`` library; no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from lbq.formats.errors import DataError, UsageError
from lbq.formats.tokenizer_file import TOKENIZER, check_rows, load_tokenizer, vocabulary_rows
from lbq.runtime.text.config import TokenizerConfig, load_tokenizer_config
from lbq.runtime.text.detokenize import Detokenizer, StreamDecoder


class Tokenizer:
    """One model's tokenizer. Thread-safe: it holds no state of a text."""

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig, where: str) -> None:
        """``backend`` is owned from here on; ``where`` names its file in errors."""
        self._backend = backend
        self._where = where
        _add_missing_tokens(backend, config, where)
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = config.special_tokens()
        """Text of ``bos_token``, ``eos_token``, … as chat templates see them; absent ones are left out."""
        special = set(config.all_special())
        added = backend.get_added_tokens_decoder()
        self._detokenizer = Detokenizer.read(
            backend,
            added=frozenset(added),
            skipped=frozenset(id for id, token in added.items() if token.special or token.content in special),
            where=where,
        )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a model folder.

        Raises DataError if ``tokenizer.json`` is missing, malformed or of a kind that lbq cannot stream.
        """
        path = folder / TOKENIZER
        if not path.exists():
            raise DataError(f"{path}: missing; save the model's tokenizer in this form (transformers does)")
        return cls(load_tokenizer(path), load_tokenizer_config(folder), str(path))

    @cached_property
    def size(self) -> int:
        """The largest token id plus one: the rows that an embedding needs."""
        return vocabulary_rows(self._backend)

    @property
    def eos_id(self) -> int | None:
        """The id of ``eos_token``, if the tokenizer names one."""
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self.token_id(eos)

    def token_id(self, token: str) -> int | None:
        """The id of a whole token, or None if the vocabulary lacks it."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if this tokenizer makes ids for which a model of ``vocab_size`` rows has no embedding."""
        check_rows(self.size, vocab_size, self._where)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``, as transformers' AutoTokenizer makes them.

        ``add_special_tokens`` puts bos and the like where the model wants them: True for plain text, False for a
        rendered chat template, which has written them itself. Raises UsageError for text that is not Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode (lone surrogate at character {error.start})") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def stream(self, *, continues_text: bool = False) -> StreamDecoder:
        """A decoder for one text that arrives token by token; see :class:`StreamDecoder`."""
        return StreamDecoder(self._detokenizer, continues_text=continues_text)

    def decode(self, ids: Sequence[int], *, continues_text: bool = False) -> str:
        """The text of ``ids`` without special tokens: by construction what :meth:`stream` would have given."""
        decoder = self.stream(continues_text=continues_text)
        return "".join(map(decoder.push, ids))


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: TokenizerConfig, where: str) -> None:
    """Declare tokens that only ``tokenizer_config.json`` declares, as transformers does.

    A named special token that is in no vocabulary is not given an id: the model has no row for it.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for id, entry in sorted((config.added_tokens_decoder or {}).items()):
        if entry.content in known:
            continue
        token = tokenizers.AddedToken(
            entry.content,
            single_word=entry.single_word,
            lstrip=entry.lstrip,
            rstrip=entry.rstrip,
            normalized=not entry.special if entry.normalized is None else entry.normalized,
            special=entry.special,
        )
        backend.add_special_tokens([token]) if entry.special else backend.add_tokens([token])
        if backend.token_to_id(entry.content) != id:
            got = backend.token_to_id(entry.content)
            raise DataError(f"{where}: {entry.content!r} has id {got}, but id {id} in tokenizer_config.json")
    present = [text for text in config.all_special() if backend.token_to_id(text) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in present])
