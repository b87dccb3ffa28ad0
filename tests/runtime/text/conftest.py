"""Tiny tokenizers of the two kinds in use, as folders like those of a model, and an engine that follows a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The capital of France is Paris, and the quick brown fox jumps over the lazy dog.",
    "你好世界 こんにちは 안녕하세요 — “quotes” … café naïve Ünïcödé",
    "def f(x):\n    return x ** 2  # 👍 👩‍👩‍👧‍👦 🏳️‍🌈 emoji",
    "numbers 0123456789 42 3.14",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind, as of SmolLM2 and Qwen: merges over bytes, so that tokens cut characters."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("<é>", normalized=False)])
    return made


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Llama 2's kind: a space becomes ▁, one is put in front, and what the vocabulary lacks becomes byte tokens."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "你",
    ]
    merges = [("▁", "a"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "▁")]
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def save(folder: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    """A model folder's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", **config}))
    return folder


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    return save(folder, byte_level(), bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>")


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return save(folder, sentencepiece_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class ScriptedEngine:
    """Says the tokens of a script one after another; keeps what it holds, and counts what it had to compute."""

    def __init__(self, script: Iterable[int], *, context: int = 1 << 20, vocab_size: int = 1000) -> None:
        self.context = context
        self.vocab_size = vocab_size
        self.script = iter(script)
        self.ids: list[int] = []
        self.computed = 0

    @property
    def position(self) -> int:
        return len(self.ids)

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        assert ids
        self.ids.extend(ids)
        assert len(self.ids) <= self.context
        self.computed += len(ids)
        logits = torch.full((self.vocab_size,), -50.0)
        logits[next(self.script)] = 50.0
        return logits

    def decode(self, token: int) -> torch.Tensor:
        return self.prefill([token])

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.position
        del self.ids[length:]


@pytest.fixture(scope="session")
def scripted() -> Callable[..., ScriptedEngine]:
    """``scripted(token_ids, context=…, vocab_size=…)``"""
    return ScriptedEngine
