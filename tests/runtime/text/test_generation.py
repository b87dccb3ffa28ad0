"""The loop ends where and why it should; streamed text equals the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbq.formats.errors import DataError, UsageError
from lbq.runtime.text.generation import (
    Finish,
    GenerationDefaults,
    GenerationOptions,
    generate_tokens,
    stream_text,
)
from lbq.runtime.text.sampling import SamplingOptions
from lbq.runtime.text.tokenizer import Tokenizer

Scripted = Callable[..., Any]
EOS = {7, 8}


@cache
def loaded(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def run(engine: Any, prompt: list[int], options: GenerationOptions, **more: Any) -> tuple[list[int], str]:
    """The tokens and the reason."""
    tokens: list[int] = []
    steps = generate_tokens(engine, prompt, options, EOS, **more)
    while True:
        try:
            tokens.append(next(steps))
        except StopIteration as end:
            return tokens, end.value


@pytest.mark.parametrize("eos", sorted(EOS))
def test_ends_on_every_eos(scripted: Scripted, eos: int) -> None:
    engine = scripted([1, 2, eos, 3])
    assert run(engine, [5, 6], GenerationOptions(max_tokens=9)) == ([1, 2], "eos")
    assert engine.ids == [5, 6, 1, 2]
    assert run(scripted([eos]), [5], GenerationOptions()) == ([], "eos")


def test_ends_at_max_tokens_without_a_needless_step(scripted: Scripted) -> None:
    engine = scripted([1, 2, 3, 4])
    assert run(engine, [5], GenerationOptions(max_tokens=3)) == ([1, 2, 3], "length")
    assert engine.ids == [5, 1, 2]


def test_ends_when_the_context_is_full(scripted: Scripted) -> None:
    for most in (None, 100):
        engine = scripted(itertools.repeat(1), context=6)
        assert run(engine, [5, 6], GenerationOptions(max_tokens=most)) == ([1] * 4, "context")
    engine = scripted(itertools.repeat(1), context=6)
    assert run(engine, [5, 6], GenerationOptions(max_tokens=4)) == ([1] * 4, "length")
    assert run(scripted([1], context=2), [5], GenerationOptions()) == ([1], "context")


@pytest.mark.parametrize("prompt", [[], [1] * 8, [1] * 9])
def test_prompts_that_do_not_fit_are_refused_before_work(
    scripted: Scripted, prompt: list[int], byte_level_folder: Path
) -> None:
    engine = scripted([], context=8)
    with pytest.raises(UsageError, match="prompt"):
        generate_tokens(engine, prompt, GenerationOptions(), EOS)
    with pytest.raises(UsageError, match="prompt"):
        stream_text(engine, loaded(byte_level_folder), prompt, GenerationOptions(), EOS)
    assert engine.computed == 0


@pytest.mark.parametrize("value", [0, -1, 2.5, "3"])
def test_max_tokens_that_make_no_sense(value: Any) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        GenerationOptions(max_tokens=value)


@pytest.mark.parametrize("stop", [("",), ("a", 5), (None,)])
def test_stop_strings_that_make_no_sense(stop: Any) -> None:
    with pytest.raises(UsageError, match="a stop string is"):
        GenerationOptions(stop=stop)


def test_what_is_held_is_not_computed_again(scripted: Scripted) -> None:
    engine = scripted([1, 2])
    engine.ids = [5, 6, 9]
    assert run(engine, [5, 6, 4], GenerationOptions(max_tokens=2), held=2) == ([1, 2], "length")
    assert engine.ids == [5, 6, 4, 1]
    assert engine.computed == 2


def collect(stream: Any) -> tuple[list[str], Finish]:
    *pieces, finish = stream
    assert all(isinstance(piece, str) and piece for piece in pieces)
    assert isinstance(finish, Finish)
    return pieces, finish


@pytest.fixture(scope="session", params=["byte_level_folder", "sentencepiece_folder"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.load(request.getfixturevalue(request.param))


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_stream_equals_the_whole(tokenizer: Tokenizer, data: st.DataObject, scripted: Scripted) -> None:
    text = data.draw(st.text(alphabet=st.sampled_from("ab é你👍\u200d\n<"), max_size=15))
    stop = tuple(data.draw(st.lists(st.text(alphabet="ab 你👍", min_size=1, max_size=3), max_size=2)))
    continues = data.draw(st.booleans())
    ids = tokenizer.encode(text, add_special_tokens=False)
    eos = 999
    options = GenerationOptions(stop=stop)
    pieces, finish = collect(
        stream_text(scripted([*ids, eos]), tokenizer, [1, 2], options, {eos}, continues_text=continues)
    )
    whole = tokenizer.decode(ids, continues_text=continues)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    assert "".join(pieces) == (whole[: min(ends)[1]] if ends else whole)
    assert finish.reason == ("stop" if ends else "eos")
    assert list(finish.tokens) == ids[: len(finish.tokens)]
    assert "\ufffd" not in "".join(pieces)


def test_text_is_cut_at_whole_characters_by_max_tokens(scripted: Scripted, byte_level_folder: Path) -> None:
    tokenizer = loaded(byte_level_folder)
    ids = tokenizer.encode("a𝔘", add_special_tokens=False)  # a character of several tokens
    assert len(ids) > 2
    pieces, finish = collect(
        stream_text(scripted(ids), tokenizer, [1], GenerationOptions(max_tokens=len(ids) - 1), EOS)
    )
    assert pieces == ["a"]
    assert finish.reason == "length"


def test_text_held_back_for_a_stop_string_comes_at_the_end(scripted: Scripted, byte_level_folder: Path) -> None:
    tokenizer = loaded(byte_level_folder)
    ids = tokenizer.encode("xyz", add_special_tokens=False)
    options = GenerationOptions(max_tokens=len(ids), stop=("z!", "yz!!"))
    pieces, finish = collect(stream_text(scripted(ids), tokenizer, [1], options, EOS))
    assert "".join(pieces) == "xyz"
    assert finish.reason == "length"


def test_a_stop_string_ends_the_work(scripted: Scripted, byte_level_folder: Path) -> None:
    tokenizer = loaded(byte_level_folder)
    ids = tokenizer.encode("one. two", add_special_tokens=False)
    engine = scripted([*ids, *ids, *ids])
    pieces, finish = collect(stream_text(engine, tokenizer, [1], GenerationOptions(stop=(". t",)), EOS))
    assert "".join(pieces) == "one"
    assert engine.computed == len(finish.tokens)  # the prompt's one token, and all new ones but the last


def test_the_finish_record(scripted: Scripted, byte_level_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr("lbq.runtime.text.generation.time.perf_counter", lambda: float(next(now)))
    tokenizer = loaded(byte_level_folder)
    engine = scripted([20, 21, 22, 7])
    engine.ids = [3]
    _, finish = collect(stream_text(engine, tokenizer, [3, 4], GenerationOptions(), EOS, held=1))
    assert (finish.prompt_tokens, finish.reused_tokens, finish.tokens) == (2, 1, (20, 21, 22))
    assert (finish.seconds_to_first_token, finish.decode_seconds, finish.decode_steps) == (1.0, 3.0, 3)
    assert finish.tokens_per_second == 1.0
    _, finish = collect(stream_text(scripted([7]), tokenizer, [3], GenerationOptions(), EOS))
    assert finish.tokens_per_second is None


def test_defaults_of_the_file(tmp_path: Path, byte_level_folder: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults()
    path.write_text('{"eos_token_id": 3, "top_p": 0.9, "temperature": 0.6, "pad_token_id": null}')
    found = GenerationDefaults.load(tmp_path)
    assert found.eos_ids == {3}
    assert found.sampling == SamplingOptions(top_p=0.9)  # do_sample is not true: greedy
    path.write_text(
        '{"eos_token_id": [3, 5], "do_sample": true, "top_k": 20, "temperature": 0.6, "repetition_penalty": 1.1, '
        '"top_p": null, "min_p": 0.02, "transformers_version": "5.0"}'
    )
    found = GenerationDefaults.load(tmp_path)
    assert found.eos_ids == {3, 5}
    assert found.sampling == SamplingOptions(temperature=0.6, top_k=20, min_p=0.02, repetition_penalty=1.1)
    path.write_text('{"do_sample": true}')
    assert GenerationDefaults.load(tmp_path).sampling == SamplingOptions(temperature=1.0)
    tokenizer = loaded(byte_level_folder)
    assert found.end_ids(tokenizer) == {3, 5}
    assert GenerationDefaults().end_ids(tokenizer) == {tokenizer.token_id("<|im_end|>")}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"eos_token_id": "2"}',
        '{"eos_token_id": -1}',
        '{"eos_token_id": [1, null]}',
        '{"do_sample": 1}',
        '{"do_sample": true, "temperature": -1}',
        '{"top_k": 2.5}',
        '{"top_p": 7}',
        '{"temperature": NaN}',
    ],
)
def test_malformed_defaults(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DataError, match=r"generation_config\.json: "):
        GenerationDefaults.load(tmp_path)
