"""Text files and their windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lbq.evaluation.windows import TextFile, cut, read_text
from lbq.formats.errors import DataError, StorageError, UsageError
from lbq.runtime.text.tokenizer import Tokenizer

Pair = tuple[Tokenizer, Tokenizer]


@pytest.fixture
def pair(checkpoints: Mapping[str, Path]) -> Pair:
    """A token a byte."""
    return Tokenizer.load(checkpoints["llama"]), Tokenizer.load(checkpoints["qwen2"])


@pytest.fixture
def with_bos(checkpoints: Mapping[str, Path], tmp_path: Path) -> Callable[[], Tokenizer]:
    """A tokenizer that begins a text with token 256 and ends it with 257."""

    def make() -> Tokenizer:
        made = json.loads((checkpoints["llama"] / "tokenizer.json").read_text())
        bos, eos = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("<|im_start|>", "<|im_end|>"))
        text = {"Sequence": {"id": "A", "type_id": 0}}
        made["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, text, eos],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                name: {"id": name, "ids": [id], "tokens": [name]}
                for name, id in (("<|im_start|>", 256), ("<|im_end|>", 257))
            },
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(made))
        return Tokenizer.load(tmp_path)

    return make


def file(text: str) -> TextFile:
    return TextFile(Path("text.txt"), text, "")


def test_windows_do_not_overlap(pair: Pair) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    windows = cut(file(text), pair, 8, None)
    assert [pair[0].decode(ids) for ids in windows] == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    assert (len(windows), windows.first, windows.positions) == (3, 4, 12)
    assert windows.ids == pair[0].encode(text[:24], add_special_tokens=False)
    odd = cut(file(text), pair, 5, None)
    assert (len(odd), odd.first, odd.positions) == (5, 2, 15)


def test_a_first_token_begins_every_window(with_bos: Callable[[], Tokenizer]) -> None:
    tokenizer = with_bos()
    windows = cut(file("abcdefgh"), (tokenizer, tokenizer), 4, None)
    assert windows.prefix == [256]
    assert [ids[0] for ids in windows] == [256, 256]
    assert [tokenizer.decode(ids) for ids in windows] == ["abc", "def"]
    assert {len(ids) for ids in windows} == {4}
    assert (windows.first, windows.positions) == (2, 4)


@pytest.mark.parametrize(("most", "windows"), [(8, 1), (15, 1), (16, 2), (10**9, 500)])
def test_max_tokens(pair: Pair, most: int, windows: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(4000))
    cut_text = cut(file(text), pair, 8, most)
    assert len(cut_text) == windows
    assert cut_text.ids == pair[0].encode(text, add_special_tokens=False)[: 8 * windows]


def test_a_long_text_is_read_in_parts(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole lines, or words; no more of them than are wanted."""
    given: list[str] = []
    real = Tokenizer.encode

    def encode(self: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        given.append(text)
        return real(self, text, add_special_tokens=add_special_tokens)

    text = "".join("a few words and a line\n" if i % 50 else "<|im_end|>" * 4 + "\n" for i in range(200)) + "x" * 300
    ids = pair[0].encode(text, add_special_tokens=False)
    monkeypatch.setattr("lbq.evaluation.windows.PART", 100)
    monkeypatch.setattr(Tokenizer, "encode", encode)
    assert cut(file(text), pair[:1], 8, None).ids == ids[: len(ids) // 8 * 8]
    parts = [part for part in given if part != "a"]
    assert "".join(parts) == text
    assert {len(part) for part in parts} <= set(range(1, 101))
    assert sum(part.endswith("\n") for part in parts) > 40
    given.clear()
    assert cut(file(text), pair[:1], 8, 240).ids == ids[:240]
    assert len("".join(part for part in given if part != "a")) < 600


def test_refusals(pair: Pair, with_bos: Callable[[], Tokenizer]) -> None:
    for text, what in (("", "the text is empty"), ("abcdefg", "7 tokens, and a window takes 8")):
        with pytest.raises(DataError, match=rf"text\.txt: {what}"):
            cut(file(text), pair, 8, None)
    with pytest.raises(UsageError, match="7 tokens at most: a window has 8"):
        cut(file("abcdefghi"), pair, 8, 7)
    with pytest.raises(DataError, match="different tokens"):
        cut(file("abcdefghi"), (pair[0], with_bos()), 8, None)


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(StorageError, match="No such file"):
        read_text(path)
    with pytest.raises(StorageError, match="not a file"):
        read_text(tmp_path)
    path.write_bytes("Grüße".encode())
    assert read_text(path) == TextFile(path, "Grüße", hashlib.sha256(path.read_bytes()).hexdigest())
    path.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 2"):
        read_text(path)
