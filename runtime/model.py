"""A loaded model: prompts in, text out."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import Unpack

import torch

from lbq.formats.errors import UsageError
from lbq.formats.spec import ModelSpec
from lbq.runtime import several
from lbq.runtime.binding import KernelUse
from lbq.runtime.devices import Device, device_errors
from lbq.runtime.explain import Explanation, explain
from lbq.runtime.ready import CacheUse, ModelWeights, Ready, make_ready
from lbq.runtime.text.batch import Request
from lbq.runtime.text.chat import ChatTemplate, Message, require_template
from lbq.runtime.text.generation import Engine, GenerationDefaults, GenerationOptions, check_room
from lbq.runtime.text.result import Result, TextStream
from lbq.runtime.text.session import ChatSession
from lbq.runtime.text.settings import GenerationSettings, numbered, options_of
from lbq.runtime.text.tokenizer import Tokenizer

Prompt = str | Sequence[Message]


class Model:
    """Weights on a device, with their tokenizer. Make one with :func:`load`; close it, or use it with ``with``.

    Several texts may be streamed in turn from one thread: each has an engine of its own, and engines are used again.
    """

    def __init__(self, weights: ModelWeights, device: Device, context: int | None, *, strict: bool = False) -> None:
        """``weights`` belong to the model from here on. Raises DataError where tokenizer and weights do not fit."""
        folder = weights.folder
        self.spec: ModelSpec = weights.spec
        self.device: torch.device = device.device
        self.note = device.note  # why a GPU that is there is not used
        self.tokenizer = Tokenizer.load(folder)
        self.tokenizer.check_vocabulary(self.spec.vocab_size)
        self.template = ChatTemplate.load(folder)
        self.defaults = GenerationDefaults.load(folder)
        self.end_ids = self.defaults.end_ids(self.tokenizer)
        self._weights, self._on = weights, device
        self._asked_context, self._strict = context, strict
        self._ready: Ready | None = None
        self._closed = False

    def close(self) -> None:
        """Give back memory, the template's process and what is mapped; the model is of no use afterwards."""
        self._ready, self._closed = None, True
        if self.template is not None:
            self.template.close()
        self._weights.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this model is closed")

    def bind(self) -> None:
        """Bind the weights to the device, if that was not done yet. Raises DataError and DeviceError."""
        self._check_open()
        if self._ready is None:
            self._ready = make_ready(
                self._weights, self._on, self._asked_context, self.defaults.sampling, strict=self._strict
            )

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        return self._made_ready().engines.context

    def kernels(self) -> list[KernelUse]:
        """Which kernel serves which layers, and why where it is not the fast one."""
        return list(self._made_ready().bound.kernels)

    def explain(self) -> Explanation:
        """Which kernel, tile and path every layer got, and why."""
        return explain(self.spec, self.kernels(), self._on)

    @property
    def cache(self) -> CacheUse:
        """How keys and values are kept."""
        return self._made_ready().cache

    @property
    def step_fallback(self) -> str | None:
        """Why a GPU does not decode by the fused step, or None where it does and on a CPU."""
        return self._made_ready().step_fallback

    @property
    def prompt_fallback(self) -> str | None:
        """Why a GPU does not take in prompts by kernels of their own, or None where it does and on a CPU."""
        return self._made_ready().prompt_fallback

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are held beyond the mapped file."""
        return self._made_ready().bound.resident_bytes

    @property
    def seconds_to_bind(self) -> float:
        """How long it took to bring the weights to the device."""
        return self._made_ready().seconds

    def new_engine(self) -> Engine:
        """An engine with an empty state."""
        ready = self._made_ready()
        with device_errors():
            return self._on.engine(ready.bound.decoder, ready.engines.context)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after each of ``ids``, float32 [T, V], from an empty state. Raises UsageError if they do not fit."""
        with self._made_ready().engines.engine() as engine:
            engine.truncate(0)
            return engine.all_logits(ids).clone()  # an inference tensor would be of no use to autograd

    def prompt_ids(self, prompt: Prompt, *, chat: bool | None = None, think: bool | None = None) -> list[int]:
        """Token ids of a text or of chat messages.

        A text is one message of a user where the model has a chat template, and continued as it is where it has none
        or with ``chat=False``. ``think`` is the template's switch. Raises UsageError for what the model cannot do.
        """
        self._check_open()  # else the template would start its process again
        if not self._chats(prompt, chat):
            assert isinstance(prompt, str)
            if think is not None:
                raise UsageError("think is a switch of the chat template, and this prompt does not go through one")
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        template = require_template(self.template)
        variables = template.thinking(think)
        messages: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.encode(template.render(messages, **variables), add_special_tokens=False)

    def options(self, **settings: Unpack[GenerationSettings]) -> GenerationOptions:
        """Options with the model's own defaults. Raises UsageError for values that make no sense."""
        return options_of(settings, self.defaults)

    def stream(
        self,
        prompt: Prompt,
        *,
        chat: bool | None = None,
        think: bool | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> TextStream:
        """Generate; pieces of whole characters as they come. Arguments and errors as :meth:`prompt_ids`, options."""
        options = self.options(**settings)
        ids = self.prompt_ids(prompt, chat=chat, think=think)
        engines = self._made_ready().engines  # last what takes time
        check_room(len(ids), engines.context)
        return engines.stream(self.tokenizer, Request(ids, options, not self._chats(prompt, chat)), self.end_ids)

    def generate(
        self,
        prompt: Prompt,
        *,
        chat: bool | None = None,
        think: bool | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> Result:
        """Generate a whole text; arguments and errors as :meth:`stream`."""
        stream = self.stream(prompt, chat=chat, think=think, **settings)
        text = "".join(stream)
        assert stream.finish is not None
        return Result(text, stream.finish)

    def stream_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        places: int | None = None,
        chat: bool | None = None,
        think: bool | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> Generator[tuple[int, Result], None, None]:
        """Whole texts, each with the number of its prompt, as they end; arguments and errors as :meth:`stream`.

        On a GPU up to ``places`` texts, by default as many of 16 as its memory holds, are decoded together: each token
        costs one pass over the weights for all of them. A prompt that waits takes the place of a text that has ended,
        and is taken in while the others wait. Where texts gain nothing by it they are generated one after the other: on
        a CPU, in float32, with 3-bit weights. A text does not depend on those beside it, up to the rounding of sums;
        with a ``seed`` text i is drawn with ``seed`` + i. A text whose logits are not finite numbers ends alone: its
        result has an ``error``.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts is a text: it must be a list of texts or of chats")
        if places is not None and not (isinstance(places, int) and places >= 1):
            raise UsageError(f"places is {places!r}: it must be an integer of at least 1")
        options = self.options(**settings)
        prompts = list(prompts)
        ids = [self.prompt_ids(prompt, chat=chat, think=think) for prompt in prompts]
        context = self._made_ready().engines.context
        for i, one in enumerate(ids):
            check_room(len(one), context, what=f"prompt {i + 1}" if len(ids) > 1 else "the prompt")
        requests = [
            Request(one, numbered(options, i), not self._chats(prompt, chat))
            for i, (prompt, one) in enumerate(zip(prompts, ids, strict=True))
        ]
        return several.results(
            self._made_ready(), self._on, self.tokenizer, requests, self.end_ids, places=places, strict=self._strict
        )

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        places: int | None = None,
        chat: bool | None = None,
        think: bool | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> list[Result]:
        """As :meth:`stream_batch`, all texts in the order of their prompts; look for results with an ``error``."""
        found = dict(self.stream_batch(prompts, places=places, chat=chat, think=think, **settings))
        return [found[i] for i in range(len(found))]

    def chat(
        self, *, system: str | None = None, think: bool | None = None, **settings: Unpack[GenerationSettings]
    ) -> ChatSession:
        """A chat with a history; errors as :class:`ChatSession`."""
        options = self.options(**settings)
        require_template(self.template).thinking(think)
        return ChatSession(
            self._made_ready().engines, self.tokenizer, self.template, options, self.end_ids, system=system, think=think
        )

    def _chats(self, prompt: Prompt, chat: bool | None) -> bool:
        if not isinstance(prompt, str):
            if chat is False:
                raise UsageError("chat messages need the chat template; pass a text to have it continued")
            return True
        return self.template is not None if chat is None else chat

    def _made_ready(self) -> Ready:
        self.bind()
        assert self._ready is not None
        return self._ready
