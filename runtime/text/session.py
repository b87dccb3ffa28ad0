"""A chat with its history. What an engine still holds of it is not computed again."""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import Literal

from lbq.runtime.engines import EnginePool
from lbq.runtime.text.chat import ChatTemplate, require_template
from lbq.runtime.text.generation import Finish, GenerationOptions, check_room, stream_text
from lbq.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatSession:
    """Messages back and forth with one model. Not for use from several threads."""

    def __init__(
        self,
        engines: EnginePool,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        options: GenerationOptions,
        eos_ids: Collection[int],
        *,
        system: str | None = None,
        think: bool | None = None,
    ) -> None:
        """``system`` is the system prompt, ``think`` the template's switch for thinking (None: its own default).

        Raises UsageError if the model has no chat template, or no such switch.
        """
        self._template = require_template(template)
        self._variables = self._template.thinking(think)
        self._engines = engines
        self._tokenizer = tokenizer
        self._options = options
        self._eos_ids = eos_ids
        self._first = () if system is None else (Turn("system", system),)
        self._history: list[Turn] = []

    @property
    def history(self) -> tuple[Turn, ...]:
        """The messages so far, the system prompt included."""
        return (*self._first, *self._history)

    def reset(self) -> None:
        """Begin a new chat with the same system prompt."""
        self._history.clear()

    def prompt_ids(self, message: str) -> list[int]:
        """The prompt that ``message`` would make: the whole chat through the template, as token ids."""
        turns = (*self.history, Turn("user", message))
        text = self._template.render([{"role": t.role, "content": t.content} for t in turns], **self._variables)
        # The template writes bos and the like itself: adding them again is the commonest way to spoil a chat.
        return self._tokenizer.encode(text, add_special_tokens=False)

    def reply(self, message: str) -> Generator[str | Finish, None, None]:
        """The answer to ``message``: pieces of text, then a :class:`Finish`.

        What was shown enters the history, also when the reader stops early. Raises UsageError at the call, and leaves
        the history as it was, if the chat no longer fits the context; DataError if the template fails.
        """
        ids = self.prompt_ids(message)
        advice = "begin a new one (/reset), send less"
        check_room(len(ids), self._engines.context, what="the chat with this message", advice=advice)
        return self._answer(message, ids)

    def _answer(self, message: str, ids: list[int]) -> Generator[str | Finish, None, None]:
        shown: list[str] = []
        try:
            with self._engines.engine() as engine:
                held = engine.reusable(ids, self._options)
                for item in stream_text(engine, self._tokenizer, ids, self._options, self._eos_ids, held=held):
                    if isinstance(item, str):
                        shown.append(item)
                    yield item
        except (GeneratorExit, KeyboardInterrupt):
            if shown:
                self._remember(message, shown)
            raise
        self._remember(message, shown)

    def _remember(self, message: str, shown: list[str]) -> None:
        self._history += [Turn("user", message), Turn("assistant", "".join(shown))]
