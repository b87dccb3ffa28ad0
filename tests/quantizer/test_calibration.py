"""Calibration text becomes samples: the same ones from the same text, and one clear error for what is no text."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors

from lbq.formats.errors import DataError, LbqError, RemoteError, StorageError, UsageError
from lbq.quantizer import calibration
from lbq.quantizer.calibration import Calibration, calibrate, read_texts


@pytest.fixture
def model(checkpoints: Mapping[str, Path]) -> Path:
    """Its tokenizer gives a token a byte."""
    return checkpoints["llama"]


def words(number: int, length: int) -> str:
    """A text of ``length`` characters that no other number has a stretch of eight in common with."""
    return "".join(f"{number:03}-{i:03} " for i in range(length // 8 + 1))[:length]


def save(path: Path, *texts: str) -> str:
    """As the file's suffix says."""
    if path.suffix == ".json":
        path.write_text(json.dumps([{"text": text, "id": 1} for text in texts]))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    else:
        path.write_text("".join(texts))
    return str(path)


def decoded(model: Path, found: Calibration) -> list[str]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tokenizer.decode(row) for row in found.tokens.tolist()]


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
def test_files(suffix: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / f"text{suffix}"
    source = save(path, words(1, 100), words(2, 90))
    found = calibrate(source, model, samples=4, length=32, seed=0)
    assert found.tokens.dtype == torch.int64
    assert found.tokens.shape == (4, 32)
    assert (found.name, found.sha256) == (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    whole = words(1, 100) + words(2, 90)
    pieces = decoded(model, found)
    assert len(set(pieces)) == 4
    assert all(piece in whole for piece in pieces)
    described = found.described()
    assert (described.samples, described.tokens) == (4, 32)
    assert described.tokens_sha256 == hashlib.sha256(found.tokens.numpy().tobytes()).hexdigest()


def test_the_seed_decides(model: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "text.json", *(words(i, 200) for i in range(20)))
    first, again, other = (calibrate(source, model, 5, 40, seed).tokens for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_are_of_many_documents(model: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "text.json", words(0, 4000), *(words(i, 50) for i in range(1, 9)))
    pieces = decoded(model, calibrate(source, model, 9, 40, 0))
    assert sorted({piece[piece.index("-") - 3 : piece.index("-")] for piece in pieces}) == [f"{i:03}" for i in range(9)]
    more = decoded(model, calibrate(source, model, 20, 40, 0))
    assert set(pieces) <= set(more)
    assert len(set(more)) == 20


def test_short_documents_are_joined(model: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "text.json", *(words(i, 16) for i in range(10)))
    found = calibrate(source, model, 3, 50, 0)
    assert found.tokens.shape == (3, 50)


def test_a_long_text_is_read_in_parts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with it: no more is tokenized than samples need, and these are from all over it."""
    monkeypatch.setattr(calibration, "PART", 1000)
    given: list[int] = []
    encoded = calibration._encoded

    def count(tokenizer: Any, documents: Sequence[str], order: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        for ids, (_, at) in zip(encoded(tokenizer, documents, order), order, strict=False):
            given.append(at)
            yield ids

    monkeypatch.setattr(calibration, "_encoded", count)
    found = calibrate(save(tmp_path / "text.txt", words(0, 20_000)), model, 5, 40, 0)
    assert found.tokens.shape == (5, 40)
    assert len(given) == 5
    assert max(given) > 10_000


def test_few_pieces_are_held(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text of few parts, which are samples of all of it; and all of them where they are all wanted."""
    monkeypatch.setattr(calibration, "PART", 50_000)
    most = 0
    add = calibration._Reservoir.add

    def count(self: Any, piece: list[int]) -> None:
        nonlocal most
        add(self, piece)
        most = max(most, len(self._kept))

    monkeypatch.setattr(calibration._Reservoir, "add", count)
    text = words(0, 20_000)
    source = save(tmp_path / "text.txt", text)
    pieces = decoded(model, calibrate(source, model, 40, 50, 0))
    assert most == 40
    places = sorted(text.index(piece) for piece in pieces)
    assert len(set(places)) == 40
    assert places[0] < len(text) / 8
    assert places[-1] > len(text) * 7 / 8
    every = calibrate(source, model, 10**6, 50, 0).tokens
    assert len({tuple(sample) for sample in every.tolist()}) == len(every) == len(text) // 50


def test_more_text_than_is_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"text\.txt: larger than 1000 bytes"):
        calibrate(save(tmp_path / "text.txt", words(0, 1001)), model, 4, 32, 0)
    read: list[int] = []

    def rows() -> Iterator[str]:
        for i in range(100):
            read.append(i)
            yield "x" * 99

    mapped = Rows(text=rows())
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: mapped))
    with pytest.raises(DataError, match=r"^some/text: more than 1000 bytes of text; give a local file"):
        read_texts("some/text")
    assert len(read) == 11


def test_fewer_than_asked_for(model: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "text.txt", words(1, 100))
    assert calibrate(source, model, 8, 30, 0).tokens.shape == (3, 30)


def test_special_tokens_begin_every_sample(model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 256)])
    tokenizer.enable_truncation(4)  # as some are saved
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = calibrate(save(tmp_path / "text.txt", words(1, 100)), tmp_path, 3, 30, 0)
    assert found.tokens[:, 0].tolist() == [256] * 3
    assert found.tokens.shape == (3, 30)
    assert not (found.tokens[:, 1:] == 256).any()
    with pytest.raises(UsageError, match="begins texts with 1 tokens"):
        calibrate(save(tmp_path / "text.txt", words(1, 100)), tmp_path, 3, 1, 0)


BAD: dict[str, tuple[str, bytes | None, type[LbqError], str]] = {
    "missing": ("gone.txt", None, StorageError, "No such file"),
    "missing, of no known kind": ("gone", None, StorageError, "no such file .* not a Hub dataset"),
    "folder": ("", None, StorageError, "not a file"),
    "parquet": ("a.parquet", b"PAR1", UsageError, "--calib .* are read"),
    "not JSON": ("a.json", b"{", DataError, "expected"),
    "an object": ("a.json", b'{"text": "a"}', DataError, "expected"),
    "no text": ("a.json", b'[{"prompt": "a"}]', DataError, "missing required field `text`"),
    "numbers": ("a.json", b'[{"text": 3}]', DataError, "expected"),
    "deep": ("a.json", b"[" * 100_000, DataError, "expected"),
    "broken line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', DataError, "on every line"),
    "not UTF-8": ("a.txt", b"abc \xff\xfe", DataError, "plain UTF-8"),
    "empty": ("a.txt", b"", DataError, "does not fill one sample of 32 tokens"),
    "no documents": ("a.json", b"[]", DataError, "does not fill one sample"),
    "short": ("a.txt", b"abc", DataError, "does not fill one sample"),
    "half a pair": ("a.json", b'[{"text": "\\ud800 and so on"}]', DataError, "expected|not valid Unicode"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_text(kind: str, model: Path, tmp_path: Path) -> None:
    name, content, error, message = BAD[kind]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        calibrate(str(path), model, 4, 32, 0)
    assert str(path) in str(raised.value) or "calibration text" in str(raised.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        calibrate(save(tmp_path / "text.txt", "text"), tmp_path, 4, 32, 0)


class Rows(dict[str, Iterable[str]]):
    column_names = property(lambda self: list(self))


def test_hub_dataset(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str, revision: str) -> Rows:
        asked.append((name, split, revision))
        return Rows(text=[words(i, 100) for i in range(5)])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = calibrate("some/text", model, 4, 32, 0)
    assert asked == [("some/text", "train", "main")]
    assert found.tokens.shape == (4, 32)
    assert found.name == "some/text"
    assert found.sha256 == read_texts("some/text").sha256


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str, revision: str) -> Rows:
        assert revision == "v2"
        raise ConnectionError(f"Couldn't reach\n'{name}' {split}")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    says = r"^some/text@v2: .*Couldn't reach 'some/text'.*; give a local file: --calib"
    with pytest.raises(RemoteError, match=says):
        read_texts("some/text@v2")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: Rows(prompt=[])))
    with pytest.raises(DataError, match="no column named text"):
        read_texts("some/text")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="datasets package is not installed"):
        read_texts("some/text")
