"""Calibration text: a local file or a Hub dataset, as samples of token ids. The same text, tokenizer and seed give the
same samples."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from lbq.formats import json_file
from lbq.formats import manifest as manifests
from lbq.formats.errors import DataError, RemoteError, StorageError, UsageError
from lbq.formats.tokenizer_file import TOKENIZER, load_tokenizer
from lbq.hub.names import HubId, parse_hub_id
from lbq.quantizer.quiet import quiet

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_BYTES = 256 << 20  # of a calibration file or dataset; 128 samples of 2048 tokens are about a megabyte
PART = 1 << 20  # characters tokenized at a time, which take 140 MB; what is longer counts as several documents
SUFFIXES = (".txt", ".json", ".jsonl")


class _Text(msgspec.Struct):
    text: str


@dataclass(frozen=True)
class Texts:
    """Documents, and the name and hash of where they came from."""

    name: str
    sha256: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """Samples of equal length: ``tokens`` is int64 [samples, tokens a sample], each beginning with the ``prefix`` that
    the tokenizer puts before a text."""

    name: str
    sha256: str
    tokens: torch.Tensor
    prefix: tuple[int, ...] = ()

    def described(self) -> manifests.Calibration:
        """The manifest's entry."""
        samples, length = self.tokens.shape
        digest = hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()
        return manifests.Calibration(self.name, self.sha256, samples, length, digest)


def calibrate(source: str, folder: Path, samples: int, length: int, seed: int) -> Calibration:
    """Samples of ``length`` tokens of the text ``source``, by the tokenizer of the model in ``folder``.

    ``samples`` of them, or as many as the text gives. Raises DataError where there is no tokenizer, the text is broken
    or fills no sample, StorageError for a file that cannot be read, RemoteError for a dataset that cannot be fetched.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise DataError(f"{path}: missing, and calibration needs tokens; save the model's tokenizer in this form")
    tokenizer = load_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    prefix = _prefix(tokenizer)
    if length <= len(prefix):
        raise UsageError(f"--seqlen {length}: the tokenizer begins texts with {len(prefix)} tokens; take more")
    texts = read_texts(source)
    pieces = _pieces(tokenizer, texts.documents, samples, length - len(prefix), seed)
    if not pieces:
        raise DataError(f"{source}: does not fill one sample of {length} tokens; give more text or a smaller --seqlen")
    return Calibration(texts.name, texts.sha256, torch.tensor([prefix + piece for piece in pieces]), tuple(prefix))


def read_texts(source: str) -> Texts:
    """The documents of a text, JSON or JSON Lines file or of a Hub dataset; raises as :func:`calibrate` does."""
    path = Path(source)
    if path.exists() or path.suffix in SUFFIXES:
        return _read_file(path)
    hub_id = parse_hub_id(source)
    if hub_id is not None:
        return _fetch(hub_id)
    raise StorageError(f"{source}: no such file ({', '.join(SUFFIXES)}), and not a Hub dataset (owner/name)")


def _read_file(path: Path) -> Texts:
    if path.suffix not in SUFFIXES and not path.is_dir():
        raise UsageError(f"--calib {path}: {', '.join(SUFFIXES)} files are read")
    data = json_file.read_bytes(path, MAX_BYTES)
    try:
        if path.suffix == ".txt":
            documents = [data.decode()]
        elif path.suffix == ".json":
            documents = [entry.text for entry in msgspec.json.decode(data, type=list[_Text])]
        else:
            documents = [entry.text for entry in msgspec.json.Decoder(_Text).decode_lines(data)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = {".txt": "plain UTF-8", ".json": '[{"text": …}, …]', ".jsonl": '{"text": …} on every line'}[path.suffix]
        raise DataError(f"{path}: expected {what}: {error}") from None
    return Texts(path.name, hashlib.sha256(data).hexdigest(), tuple(documents))


def _fetch(hub_id: HubId) -> Texts:
    name = str(hub_id)
    advice = "give a local file: --calib FILE (.txt, .json or .jsonl)"
    try:
        with quiet():
            from datasets import load_dataset  # slow to import
    except ModuleNotFoundError:
        raise UsageError(f"{name}: the datasets package is not installed; {advice}") from None
    try:
        with quiet():
            rows = load_dataset(hub_id.name, split="train", revision=hub_id.revision)
    except Exception as error:  # the library raises its own kinds, httpx's and OSError's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RemoteError(f"{name}: no calibration text from the Hub: {reason}; {advice}") from error
    if "text" not in rows.column_names:
        raise DataError(f"{name}: the dataset has no column named text; {advice}")
    documents, digest, size = [], hashlib.sha256(), 0
    for document in map(str, rows["text"]):  # read from the disk one by one: they may be more than memory holds
        data = document.encode("utf-8", "surrogatepass")
        digest.update(data + b"\0")
        documents.append(document)
        size += len(data)
        if size > MAX_BYTES:
            raise DataError(f"{name}: more than {MAX_BYTES} bytes of text; {advice}")
    return Texts(name, digest.hexdigest(), tuple(documents))


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    whole, bare = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return list(whole[: next(starts, 0)])


def _pieces(tokenizer: Tokenizer, documents: Sequence[str], wanted: int, length: int, seed: int) -> list[list[int]]:
    """Stretches of ``length`` tokens: one of each document first, in random order, so that the samples are many
    documents and not one; then more of each. What is shorter, and tails, are joined. No more than twice what is wanted
    is held."""
    draw = random.Random(seed)
    order = [(number, at) for number, text in enumerate(documents) for at in range(0, max(1, len(text)), PART)]
    draw.shuffle(order)
    first: list[list[int]] = []
    rest = _Reservoir(wanted, seed + 1)
    tail: list[int] = []
    for ids in _encoded(tokenizer, documents, order):
        cut = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        if cut:
            first.append(cut.pop(draw.randrange(len(cut))))
            if len(first) == wanted:
                return first
            for piece in cut:
                rest.add(piece)
        tail.extend(ids[len(ids) - len(ids) % length :])
        while len(tail) >= length:
            rest.add(tail[:length])
            del tail[:length]
    return (first + rest.shuffled())[:wanted]


class _Reservoir:
    """At most ``size`` of the pieces that pass, each with the same chance (Vitter's algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self._draw, self._size = random.Random(seed), size
        self._seen, self._kept = 0, list[list[int]]()

    def add(self, piece: list[int]) -> None:
        self._seen += 1
        if len(self._kept) < self._size:
            self._kept.append(piece)
        elif (place := self._draw.randrange(self._seen)) < self._size:
            self._kept[place] = piece

    def shuffled(self) -> list[list[int]]:
        """What was kept, in random order: pieces of one document do not stand together."""
        self._draw.shuffle(self._kept)
        return self._kept


def _encoded(tokenizer: Tokenizer, documents: Sequence[str], order: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    for number, at in order:
        try:
            yield list(tokenizer.encode(documents[number][at : at + PART], add_special_tokens=False).ids)
        except UnicodeEncodeError as error:  # JSON can hold half a pair
            raise DataError(
                f"calibration text {number}: not valid Unicode (lone surrogate at character {at + error.start})"
            ) from None
