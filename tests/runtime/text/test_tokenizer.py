"""Ids as transformers gives them; text back without a broken character."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from lbq.formats.errors import DataError, UsageError
from lbq.runtime.text.tokenizer import Tokenizer

TEXTS = [
    "The capital of France is Paris.",
    " leading and  double  spaces ",
    "你好，世界! こんにちは",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "<|im_start|>user\nhi<|im_end|>\n<think>",
    "<s>hello</s> a<unk>",
    "tabs\tand\nnewlines\r\n",
    "",
    "\x00\x07 control",
]
KINDS = ["byte_level_folder", "sentencepiece_folder"]


@cache
def loaded(folder: Path) -> Tokenizer:
    """Hypothesis asks for the same tokenizer hundreds of times."""
    return Tokenizer.load(folder)


@pytest.fixture(scope="session", params=KINDS)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_as_transformers(folder: Path, add_special_tokens: bool) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.eos_id == theirs.eos_token_id


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_stream_equals_decode_on_text(folder: Path, data: st.DataObject) -> None:
    ours = loaded(folder)
    text = data.draw(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
    ids = ours.encode(text, add_special_tokens=False)
    stream = ours.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == ours._backend.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_any_ids_stream_as_the_library_decodes(data: st.DataObject, byte_level_folder: Path) -> None:
    ours = loaded(byte_level_folder)
    literal = ours.token_id("<é>")  # the library takes its é for a byte: see the test below
    ids = data.draw(st.lists(st.integers(0, ours.size + 5).filter(lambda i: i != literal), max_size=20))
    whole = ours._backend.decode(ids, skip_special_tokens=True)
    got = ours.decode(ids)
    assert whole in (got, got + "\ufffd")  # the character that ids end in the middle of is left out


def test_no_piece_is_part_of_a_character(folder: Path) -> None:
    ours = Tokenizer.load(folder)
    text = "a👩‍👩‍👧‍👦你好🏳️‍🌈é" * 3
    stream = ours.stream()
    pieces = [stream.push(token) for token in ours.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text
    assert "" in pieces  # some token ended inside a character
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_replacement_character_in_the_text_survives_and_none_is_invented(folder: Path) -> None:
    ours = Tokenizer.load(folder)
    ids = ours.encode("a\ufffd", add_special_tokens=False)
    assert ours.decode(ids) == "a\ufffd"
    assert ours.decode(ids[:-1]) == "a"  # cut inside the character
    assert ours.decode(ours.encode("x👍", add_special_tokens=False)[:-1]) == "x"


def test_bad_bytes_do_not_spoil_the_characters_before_them(sentencepiece_folder: Path) -> None:
    ours = Tokenizer.load(sentencepiece_folder)
    ids = [ours.token_id(f"<0x{byte:02X}>") for byte in (*"é".encode(), 0xFF, *b"z")]
    assert [ours.decode(ids[:n]) for n in range(1, 5)] == ["", "é", "é\ufffd", "é\ufffdz"]


def test_added_tokens_are_literal_text(byte_level_folder: Path) -> None:
    ours = Tokenizer.load(byte_level_folder)
    ids = ours.encode("<é> <think>", add_special_tokens=False)
    assert ours.decode(ids) == "<é> <think>"


def test_leading_space_is_kept_only_when_text_continues(sentencepiece_folder: Path) -> None:
    ours = Tokenizer.load(sentencepiece_folder)
    ids = ours.encode("hello", add_special_tokens=True)
    assert ours.decode(ids) == "hello"
    assert ours.decode(ids, continues_text=True) == " hello"
    double = ours.encode("  a", add_special_tokens=False)
    assert ours.decode(double) == "  a"


def test_metaspace_decoder(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"▁▁a▁b": 0, "▁c": 1}, unk_token="▁c"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<s>"])
    for scheme in ("always", "never"):
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
        backend.save(str(tmp_path / "tokenizer.json"))
        ours = Tokenizer.load(tmp_path)
        for ids in ([0, 1, 0], [1, 1], [2, 1], [2, 0, 2, 0]):
            assert ours.decode(ids) == backend.decode(ids, skip_special_tokens=True)


def test_tokens_declared_in_the_config_only(tmp_path: Path, byte_level_folder: Path) -> None:
    from transformers import AutoTokenizer

    size = Tokenizer.load(byte_level_folder).size
    entry = {"content": "<tool>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "the", "added_tokens_decoder": {size: entry}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("a<tool> the", add_special_tokens=False)
    assert size in ids
    assert ids == theirs.encode("a<tool> the", add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    config["added_tokens_decoder"] = {size + 7: entry}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="<tool>"):
        Tokenizer.load(tmp_path)


def test_special_tokens_map_of_old_folders(tmp_path: Path, byte_level_folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>", "lstrip": false}}')
    assert Tokenizer.load(tmp_path).special_tokens == {"eos_token": "<|im_end|>"}


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path, byte_level_folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    want = Tokenizer.load(byte_level_folder).encode(TEXTS[0], add_special_tokens=True)
    assert Tokenizer.load(tmp_path).encode(TEXTS[0], add_special_tokens=True) == want


def test_tokenizer_larger_than_the_vocabulary(folder: Path) -> None:
    ours = Tokenizer.load(folder)
    ours.check_vocabulary(ours.size)
    with pytest.raises(DataError, match=r"tokenizer\.json: .*another model"):
        ours.check_vocabulary(ours.size - 1)


def test_text_that_is_not_unicode(folder: Path) -> None:
    with pytest.raises(UsageError, match="character 1"):
        Tokenizer.load(folder).encode("a\udcff", add_special_tokens=False)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 100_000, b"\xff", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'],
)
def test_malformed_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: [^\n]+$"):
        Tokenizer.load(tmp_path)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", '{"eos_token": 3}', '{"added_tokens_decoder": {"-1": {"content": "a"}}}', "{"]
)
def test_malformed_config(tmp_path: Path, byte_level_folder: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: "):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace(tokenizers.Regex("a+"), " ")]),
        decoders.Sequence([decoders.ByteLevel(), decoders.ByteFallback()]),
    ],
    ids=["none", "wordpiece", "strip-each", "strip-end", "regex", "mixed"],
)
def test_decoders_that_cannot_be_streamed_are_refused(tmp_path: Path, decoder: decoders.Decoder | None) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json: decoder"):
        Tokenizer.load(tmp_path)
