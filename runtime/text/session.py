"""A chat: its history, and an engine that does not compute the same beginning twice."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lbq.formats.errors import UsageError
from lbq.runtime.text.chat import ChatTemplate
from lbq.runtime.text.generation import Engine, Finish, GenerationOptions, stream_text
from lbq.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class TrackedEngine:
    """An :class:`Engine` that knows which tokens its state holds."""

    def __init__(self, engine: Engine) -> None:
        """``engine`` must be used through this object only from here on; what it held is forgotten."""
        engine.truncate(0)
        self._engine = engine
        self._ids: list[int] = []

    @property
    def context(self) -> int:
        return self._engine.context

    @property
    def position(self) -> int:
        return len(self._ids)

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        logits = self._engine.prefill(ids)
        self._ids.extend(ids)
        return logits

    def decode(self, token: int) -> torch.Tensor:
        logits = self._engine.decode(token)
        self._ids.append(token)
        return logits

    def truncate(self, length: int) -> None:
        # Passed on even if nothing changes here: a step that was interrupted may have left more than is known.
        self._engine.truncate(length)
        del self._ids[length:]

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """How many first tokens of a prompt need not be computed; never all, the last one's logits are wanted."""
        most = min(len(self._ids), len(ids) - 1)
        return next((i for i in range(most) if self._ids[i] != ids[i]), most)


class ChatSession:
    """Messages back and forth with one model, on one engine. Not for use from several threads."""

    def __init__(
        self,
        engine: Engine,
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
        if template is None:
            raise UsageError("this model has no chat template: it continues text but does not chat (--no-chat)")
        if think is not None and not template.supports_thinking:
            raise UsageError("this model's chat template has no switch for thinking: leave out --think and --no-think")
        self._engine = TrackedEngine(engine)
        self._tokenizer = tokenizer
        self._template = template
        self._options = options
        self._eos_ids = eos_ids
        self._first = () if system is None else (Turn("system", system),)
        self._variables = {} if think is None else {"enable_thinking": think}
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
        if len(ids) >= self._engine.context:
            raise UsageError(
                f"the chat has {len(ids)} tokens with this message and the context holds {self._engine.context}, the "
                "answer included: begin a new one (/reset), send less, or load the model with a longer context"
            )
        return self._answer(message, ids)

    def _answer(self, message: str, ids: list[int]) -> Generator[str | Finish, None, None]:
        shown: list[str] = []
        held = self._engine.shared_prefix(ids)
        stream = stream_text(self._engine, self._tokenizer, ids, self._options, self._eos_ids, held=held)
        try:
            for item in stream:
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
