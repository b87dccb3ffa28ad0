"""A byte-level BPE tokenizer as the metadata of a GGUF file.

llama.cpp has the rule that splits text before merging in its own code, under a name. A tokenizer whose rule has none
is not exported: its text would be split differently, without an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from lbq.formats import json_file
from lbq.formats.artifact import Artifact
from lbq.formats.tokenizer_file import TOKENIZER

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NAMES = {LLAMA3: "llama-bpe", LLAMA3.replace("{1,3}", ""): "qwen2"}


class _Model(msgspec.Struct):
    type: str = ""
    vocab: dict[str, int] = {}
    merges: list[str | tuple[str, str]] = []
    byte_fallback: bool | None = False


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Pattern(msgspec.Struct):
    Regex: str = ""


class _Step(msgspec.Struct):
    type: str
    pretokenizers: list[_Step] = []
    pattern: _Pattern | None = None
    individual_digits: bool = False
    use_regex: bool = True


class _File(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []
    pre_tokenizer: _Step | None = None


class _Generation(msgspec.Struct):
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None


@dataclass(frozen=True)
class GgufTokenizer:
    """What ``tokenizer.ggml`` holds. ``kinds`` and ``tokens`` have an entry a row of the embedding."""

    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    bos: int | None
    eos: int | None
    template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        writer.add_token_merges(list(self.merges))
        writer.add_vocab_size(len(self.tokens))
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        if self.eos is not None:
            writer.add_eos_token_id(self.eos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def tokenizer_of(artifact: Artifact) -> GgufTokenizer | None:
    """The artifact's tokenizer; None for one that llama.cpp has no name for or that has no merges, which it does not
    take, or where there is none."""
    path = artifact.folder / TOKENIZER
    if not path.is_file():
        return None
    file = json_file.read(path, _File)
    pre = _name(file.pre_tokenizer)
    if pre is None or file.model.type != "BPE" or file.model.byte_fallback or not file.model.merges:
        return None
    rows = artifact.spec.vocab_size
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in file.model.vocab.items():
        tokens[i], kinds[i] = token, NORMAL
    for added in file.added_tokens:
        tokens[added.id], kinds[added.id] = added.content, CONTROL if added.special else USER_DEFINED
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in file.model.merges)
    settings = artifact.folder / "generation_config.json"
    found = json_file.read(settings, _Generation) if settings.is_file() else _Generation()
    eos = found.eos_token_id[0] if isinstance(found.eos_token_id, list) else found.eos_token_id
    template = artifact.folder / "chat_template.jinja"
    text = json_file.read_bytes(template).decode() if template.is_file() else None
    return GgufTokenizer(pre, tuple(tokens), tuple(kinds), merges, found.bos_token_id, eos, text)


def _name(step: _Step | None) -> str | None:
    """llama.cpp's name of what splits text."""
    steps = [] if step is None else step.pretokenizers or [step]
    kinds = [each.type for each in steps]
    if kinds == ["Split", "ByteLevel"] and steps[0].pattern is not None:
        return NAMES.get(steps[0].pattern.Regex)
    if kinds == ["Digits", "ByteLevel"] and steps[0].individual_digits:
        return "smollm"
    return "gpt-2" if kinds == ["ByteLevel"] and steps[0].use_regex else None
