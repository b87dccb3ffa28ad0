"""A tokenizer.json that the Rust library does not survive is refused like any other broken file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from lbq.formats.errors import DataError, StorageError
from lbq.formats.tokenizer_file import load_tokenizer
from lbq.quantizer.source import check_tokenizer
from lbq.runtime.text.tokenizer import Tokenizer

PANIC = (
    '{"normalizer":{"type":"Precompiled","precompiled_charsmap":"AAAA"},"model":{"type":"BPE","vocab":{},"merges":[]}}'
)
FATAL = '"type":"BPE","vocab":{"a":0,"é":1,"aé":2},"merges":[["a","é"]]'  # with the prefix x, the process aborts
STRINGS = FATAL.replace('["a","é"]', '"a é"')

READERS: dict[str, Callable[[Path], object]] = {
    "the loader": load_tokenizer,
    "the quantizer": lambda path: check_tokenizer(path.parent, 1000),
    "the runtime": lambda path: Tokenizer.load(path.parent),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("reader", READERS)
def test_a_panic(reader: str, path: Path) -> None:
    path.write_text(PANIC)
    with pytest.raises(DataError, match=r"tokenizer\.json: .*precompiled_charsmap"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_merge_without_the_prefix(reader: str, path: Path) -> None:
    path.write_text(f'{{"model":{{"continuing_subword_prefix":"x",{FATAL}}}}}')
    with pytest.raises(DataError, match=r"tokenizer\.json: a merge joins 'é', which does not begin with .* 'x'"):
        READERS[reader](path)


@pytest.mark.parametrize(
    "text",
    [
        f'{{"model":{{{FATAL},"\\u0063ontinuing_subword_prefix":"x"}}}}',
        f'{{"model":{{{FATAL.replace("BPE", "Other")},"continuing_subword_prefix":"x"}}}}',
        f'{{"model":{{{STRINGS},"continuing_subword_prefix":"x"}}}}',
        f'{{"model":{{"continuing_subword_prefix":null,{FATAL},"continuing_subword_prefix":"x"}}}}',
    ],
)
def test_a_prefix_however_it_is_written(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match="a merge joins 'é'"):
        load_tokenizer(path)


def test_the_library_reads_what_was_checked(path: Path) -> None:
    """The first of two equal keys is never seen by it."""
    harmless = '{"type":"BPE","vocab":{"a":0},"merges":[]}'
    path.write_text(f'{{"model":{{"continuing_subword_prefix":"x",{FATAL}}},"model":{harmless}}}')
    assert load_tokenizer(path).get_vocab() == {"a": 0}


@pytest.mark.parametrize("prefix", ["##", "é", "", None])
def test_prefixes_that_fit(prefix: str | None, path: Path) -> None:
    right = f"{prefix or ''}b"
    model = {"type": "BPE", "vocab": {"a": 0, right: 1, "ab": 2}, "merges": [["a", right]]}
    path.write_text(json.dumps({"model": model | {"continuing_subword_prefix": prefix}}))
    assert load_tokenizer(path).encode("ab").tokens == ["ab"]


def test_nothing_else_changes(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["llama"] / "tokenizer.json"
    assert load_tokenizer(path).to_str() == tokenizers.Tokenizer.from_file(str(path)).to_str()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model":1}', '{"model":{"type":"x"}}', "[" * 10**5])
def test_broken(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match=r"^\S*tokenizer\.json: "):
        load_tokenizer(path)
    path.unlink()
    with pytest.raises(StorageError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_interrupts_are_no_panics(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        @staticmethod
        def from_buffer(_: bytes) -> None:
            raise KeyboardInterrupt

    path.write_text(PANIC)
    monkeypatch.setattr(tokenizers, "Tokenizer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(path)
