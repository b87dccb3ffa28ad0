"""A chat remembers what was said and shown, and computes each beginning once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq.formats.errors import DataError, DeviceError, UsageError
from lbq.runtime.engines import EnginePool
from lbq.runtime.text.chat import ChatTemplate
from lbq.runtime.text.generation import Finish, GenerationOptions
from lbq.runtime.text.sampling import SamplingOptions
from lbq.runtime.text.session import ChatSession, Turn
from lbq.runtime.text.tokenizer import Tokenizer

Scripted = Callable[..., Any]
SOURCE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    made = ChatTemplate(SOURCE, {}, "here")
    yield made
    made.close()


class Chats:
    """Makes sessions whose engines give the answers written down for them; ``engine`` is the latest."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, scripted: Scripted) -> None:
        self.tokenizer, self.template, self.scripted = tokenizer, template, scripted
        self.engine: Any = None

    def session(self, *answers: str, context: int = 4096, **options: Any) -> ChatSession:
        end = self.tokenizer.token_id("<|im_end|>")
        assert end is not None
        tokens = [id for text in answers for id in (*self.tokenizer.encode(text, add_special_tokens=False), end)]
        script = iter(tokens)
        self.pool = EnginePool(lambda: self.make(script, context), context)
        sampling = SamplingOptions(seed=options.pop("seed", None))
        chosen = GenerationOptions(stop=options.pop("stop", ()), sampling=sampling)
        return ChatSession(self.pool, self.tokenizer, self.template, chosen, {end}, **options)

    def make(self, script: Iterator[int], context: int) -> Any:
        self.engine = self.scripted(script, context=context)
        return self.engine


@pytest.fixture
def chats(tokenizer: Tokenizer, template: ChatTemplate, scripted: Scripted) -> Chats:
    return Chats(tokenizer, template, scripted)


def say(session: ChatSession, message: str) -> tuple[str, Finish]:
    *pieces, finish = session.reply(message)
    assert isinstance(finish, Finish)
    return "".join(str(piece) for piece in pieces), finish


def test_history_and_reuse(chats: Chats) -> None:
    session = chats.session("Hello 👍", "Fine", system="Be brief")
    answer, first = say(session, "Hi")
    assert (answer, first.reason, first.reused_tokens) == ("Hello 👍", "eos", 0)
    prompt = session.prompt_ids("How?")
    computed = chats.engine.computed
    answer, second = say(session, "How?")
    assert answer == "Fine"
    assert second.prompt_tokens == len(prompt)
    # All of the first exchange is held but the <|im_end|> that was sampled and never taken in.
    assert second.reused_tokens == first.prompt_tokens + len(first.tokens)
    assert chats.engine.computed - computed == len(prompt) - second.reused_tokens + len(second.tokens)
    assert chats.engine.ids == [*prompt, *second.tokens]
    assert session.history == (
        Turn("system", "Be brief"),
        Turn("user", "Hi"),
        Turn("assistant", "Hello 👍"),
        Turn("user", "How?"),
        Turn("assistant", "Fine"),
    )


def test_the_prompt_is_the_template_and_nothing_more(chats: Chats) -> None:
    session = chats.session(system="S")
    want = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = session.prompt_ids("Hi")
    assert ids == chats.tokenizer.encode(want, add_special_tokens=False)
    assert ids.count(chats.tokenizer.token_id("<|im_start|>")) == 3


def test_a_tokenizer_that_adds_bos_does_not_add_a_second(sentencepiece_folder: Path, scripted: Scripted) -> None:
    tokenizer = Tokenizer.load(sentencepiece_folder)
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", tokenizer.special_tokens, "here")
    session = ChatSession(EnginePool(lambda: scripted([]), 64), tokenizer, template, GenerationOptions(), ())
    assert session.prompt_ids("a").count(1) == 1
    template.close()


def test_reset_keeps_the_system_prompt_and_its_state(chats: Chats) -> None:
    session = chats.session("one", "two", system="Be brief")
    say(session, "Hi")
    session.reset()
    assert session.history == (Turn("system", "Be brief"),)
    answer, finish = say(session, "Ho")
    assert answer == "two"
    assert 0 < finish.reused_tokens < finish.prompt_tokens
    assert chats.engine.ids[: finish.prompt_tokens] == (session.reset(), session.prompt_ids("Ho"))[1]


def test_thinking_switch(chats: Chats) -> None:
    think = chats.tokenizer.token_id("<think>")
    assert think in chats.session(think=False).prompt_ids("Hi")
    assert think not in chats.session(think=True).prompt_ids("Hi")
    assert think not in chats.session().prompt_ids("Hi")


def test_a_template_without_the_switch_or_none_at_all(chats: Chats, tokenizer: Tokenizer) -> None:
    plain = ChatTemplate("{{ messages[0].content }}", {}, "here")
    pool = EnginePool(lambda: chats.scripted([]), 64)
    with pytest.raises(UsageError, match="--think"):
        ChatSession(pool, tokenizer, plain, GenerationOptions(), (), think=False)
    with pytest.raises(UsageError, match="--no-chat"):
        ChatSession(pool, tokenizer, None, GenerationOptions(), ())


def test_a_full_context_is_said_and_nothing_is_lost(chats: Chats) -> None:
    session = chats.session("one", "two", context=60)
    say(session, "Hi")
    before, computed = session.history, chats.engine.computed
    with pytest.raises(UsageError, match=r"the context holds 60.*/reset"):
        session.reply("x" * 100)
    assert session.history == before
    assert chats.engine.computed == computed
    assert say(session, "Go")[0] == "two"


def test_an_answer_that_fills_the_context_says_so(chats: Chats) -> None:
    session = chats.session("a" * 50, context=30)
    answer, finish = say(session, "Hi")
    assert finish.reason == "context"
    assert answer
    assert finish.prompt_tokens + len(finish.tokens) == 30


def test_an_answer_the_reader_leaves_is_kept_as_far_as_shown(chats: Chats) -> None:
    session = chats.session("Hello there", "again")
    stream = session.reply("Hi")
    shown = [next(stream), next(stream)]
    stream.close()
    assert session.history == (Turn("user", "Hi"), Turn("assistant", "".join(map(str, shown))))
    rest = session.prompt_ids("Ho")
    _, finish = say(session, "Ho")
    assert finish.reused_tokens > 0
    assert chats.engine.ids[: len(rest)] == rest


def test_an_answer_left_before_anything_was_shown_is_not_kept(chats: Chats) -> None:
    session = chats.session("Hello")

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with chats.pool.engine():
        chats.engine.prefill = interrupted
    with pytest.raises(KeyboardInterrupt):
        say(session, "Hi")
    assert session.history == ()


def test_an_interrupted_step_leaves_the_state_right(chats: Chats) -> None:
    session = chats.session("one two three", "fine")
    with chats.pool.engine():
        first = chats.engine
    real = first.prefill

    def interrupted(ids: list[int]) -> Any:
        first.ids.extend(ids[:3])  # half done
        raise KeyboardInterrupt

    first.prefill = interrupted
    with pytest.raises(KeyboardInterrupt):
        say(session, "Hi")
    assert session.history == ()
    first.prefill = real
    prompt = session.prompt_ids("Hi")
    say(session, "Hi")
    assert chats.engine is first
    assert first.ids[: len(prompt)] == prompt


@pytest.mark.parametrize(("error", "seen"), [(DataError, DataError), (torch.OutOfMemoryError, DeviceError)])
def test_after_an_error_the_engine_is_another(chats: Chats, error: Any, seen: Any) -> None:
    session = chats.session("one two three", "fine")
    assert say(session, "Hi")[0] == "one two three"
    first = chats.engine

    def failing(_: object) -> Any:
        raise error("broken")

    first.decode = failing
    with pytest.raises(seen):
        say(session, "Ho")
    assert len(session.history) == 2
    _, finish = say(session, "Ho")
    assert chats.engine is not first
    assert finish.reused_tokens == 0


def test_a_seed_computes_every_prompt_whole(chats: Chats) -> None:
    session = chats.session("one", "two", seed=1)
    say(session, "Hi")
    assert say(session, "Ho")[1].reused_tokens == 0


def test_stop_strings_are_not_in_the_history(chats: Chats) -> None:
    session = chats.session("yes STOP no", stop=(" STOP",))
    assert say(session, "Hi")[0] == "yes"
    assert session.history[-1] == Turn("assistant", "yes")
