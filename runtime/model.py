"""A loaded artifact: prompts in, text out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch

from lbq.formats.artifact import Artifact, open_artifact
from lbq.formats.errors import DeviceError, UsageError
from lbq.formats.spec import ModelSpec
from lbq.runtime.binding import KernelUse, bind
from lbq.runtime.devices import Device, find_device
from lbq.runtime.engine import EagerEngine
from lbq.runtime.text.chat import ChatTemplate, Message
from lbq.runtime.text.generation import Finish, GenerationDefaults, GenerationOptions, stream_text
from lbq.runtime.text.session import ChatSession, TrackedEngine
from lbq.runtime.text.tokenizer import Tokenizer

Prompt = str | Sequence[Message]


class GenerationSettings(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``; what is left out is as ``generation_config.json`` has it."""

    max_tokens: int | None  # None: until the context is full
    stop: Sequence[str]
    temperature: float  # 0: the most probable token every time
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


@dataclass(frozen=True)
class Result:
    """A generated text and how it ended."""

    text: str
    finish: Finish


class TextStream(Iterator[str]):
    """Pieces of a text as they come; ``finish`` is set after the last."""

    def __init__(self, items: Generator[str | Finish, None, None]) -> None:
        self._items = items
        self.finish: Finish | None = None

    def __next__(self) -> str:
        for item in self._items:
            if isinstance(item, str):
                return item
            self.finish = item
        raise StopIteration

    def close(self) -> None:
        """Stop before the end."""
        self._items.close()


class Model:
    """An artifact on a device, with its tokenizer. Make one with :func:`load`.

    Several texts may be streamed in turn from one thread: each has an engine of its own, and engines are used again.
    """

    def __init__(self, artifact: Artifact, device: Device, context: int) -> None:
        """``artifact`` belongs to the model from here on. Raises DataError where its parts do not fit."""
        folder = artifact.folder
        self.spec: ModelSpec = artifact.spec
        self.device: torch.device = device.device
        self.context = context
        self.tokenizer = Tokenizer.load(folder)  # first what is quick to refuse
        self.tokenizer.check_vocabulary(self.spec.vocab_size)
        self.template = ChatTemplate.load(folder)
        self.defaults = GenerationDefaults.load(folder)
        self.end_ids = self.defaults.end_ids(self.tokenizer)
        self._artifact, self._on = artifact, device
        self._bound = bind(artifact, device)
        self._idle: list[TrackedEngine] = []

    def close(self) -> None:
        """Give back the template's process and what is mapped; the model is of no use afterwards."""
        if self.template is not None:
            self.template.close()
        self._artifact.close()

    def kernels(self) -> list[KernelUse]:
        """Which kernel serves which layers, and why where it is not the fast one."""
        return list(self._bound.kernels)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are held beyond the mapped file."""
        return self._bound.resident_bytes

    def new_engine(self) -> EagerEngine:
        """An engine with an empty state."""
        return self._on.engine(self._bound.decoder, self.context)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after each of ``ids``, float32 [T, V], from an empty state. Raises UsageError if they do not fit."""
        return self.new_engine().all_logits(ids)

    def prompt_ids(self, prompt: Prompt, *, chat: bool | None = None, think: bool | None = None) -> list[int]:
        """Token ids of a text or of chat messages.

        A text is one message of a user where the model has a chat template, and continued as it is where it has none
        or with ``chat=False``. ``think`` is the template's switch. Raises UsageError for what the model cannot do.
        """
        if not self._chats(prompt, chat):
            assert isinstance(prompt, str)
            if think is not None:
                raise UsageError("think is a switch of the chat template, and this prompt does not go through one")
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        if self.template is None:
            raise UsageError("this model has no chat template: it continues text but does not chat")
        if think is not None and not self.template.supports_thinking:
            raise UsageError("this model's chat template has no switch for thinking")
        messages: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        variables = {} if think is None else {"enable_thinking": think}
        return self.tokenizer.encode(self.template.render(messages, **variables), add_special_tokens=False)

    def options(self, **settings: Unpack[GenerationSettings]) -> GenerationOptions:
        """Options with the model's own defaults. Raises UsageError for values that make no sense."""
        known = GenerationSettings.__annotations__.keys()
        odd = settings.keys() - known
        if odd:
            raise UsageError(f"unknown settings: {', '.join(sorted(odd))}; there are {', '.join(known)}")
        sampling = {k: v for k, v in settings.items() if k not in ("max_tokens", "stop")}
        return GenerationOptions(
            max_tokens=settings.get("max_tokens"),
            sampling=replace(self.defaults.sampling, **sampling),  # type: ignore[arg-type]
            stop=tuple(settings.get("stop", ())),
        )

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
        engine = self._idle.pop() if self._idle else TrackedEngine(self.new_engine())
        try:
            items = stream_text(
                engine,
                self.tokenizer,
                ids,
                options,
                self.end_ids,
                held=engine.shared_prefix(ids),
                continues_text=not self._chats(prompt, chat),
            )
        except BaseException:
            self._idle.append(engine)
            raise
        return TextStream(self._handing_back(items, engine))

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

    def chat(
        self, *, system: str | None = None, think: bool | None = None, **settings: Unpack[GenerationSettings]
    ) -> ChatSession:
        """A chat with a history; errors as :class:`ChatSession`."""
        return ChatSession(
            self.new_engine(),
            self.tokenizer,
            self.template,
            self.options(**settings),
            self.end_ids,
            system=system,
            think=think,
        )

    def _chats(self, prompt: Prompt, chat: bool | None) -> bool:
        if not isinstance(prompt, str):
            if chat is False:
                raise UsageError("chat messages need the chat template; pass a text to have it continued")
            return True
        return self.template is not None if chat is None else chat

    def _handing_back(
        self, items: Generator[str | Finish, None, None], engine: TrackedEngine
    ) -> Generator[str | Finish, None, None]:
        try:
            yield from items
        finally:
            self._idle.append(engine)


def load(
    path: Path | str,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32"] = "auto",
    context: int | None = None,
    strict: bool = False,
    threads: int | None = None,
) -> Model:
    """Map the artifact in ``path`` and bind it to a device.

    ``dtype="float32"`` is the reference mode: exact products, slow. ``context``: the most tokens of a text, at most the
    model's; by default the model's on the CPU, where the cache grows as needed, and at most 8192 on a GPU. ``strict``
    refuses kernels that are not the fast path. ``threads`` is torch's number of threads, for the whole process.

    Raises StorageError and DataError for the folder, UsageError for arguments, DeviceError for the device.
    """
    if dtype not in ("auto", "float32"):
        raise UsageError(f"dtype {dtype}: auto or float32")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device}: auto, cpu or cuda")
    if threads is not None:
        if threads < 1:
            raise UsageError(f"{threads} threads: at least 1 is needed")
        torch.set_num_threads(threads)
    where = find_device(device, exact=dtype == "float32")
    artifact = open_artifact(path)
    try:
        context = _checked_context(context, where, artifact)
        model = Model(artifact, where, context)
        if strict:
            _refuse_fallbacks(model)
    except BaseException:
        artifact.close()
        raise
    return model


def _checked_context(context: int | None, device: Device, artifact: Artifact) -> int:
    most = artifact.spec.context
    if context is None:
        return device.default_context(artifact.spec)
    if not 1 <= context <= most:
        raise UsageError(f"context {context}: {artifact.folder} was made for 1 to {most} tokens")
    return context


def _refuse_fallbacks(model: Model) -> None:
    slow = [use for use in model.kernels() if use.fallback is not None]
    if slow:
        first = slow[0]
        more = f" (and {len(slow) - 1} more)" if len(slow) > 1 else ""
        raise DeviceError(f"{first.units}: {first.kernel}, because {first.fallback}{more}; refused under --strict")
