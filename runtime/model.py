"""A loaded model: prompts in, text out."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, TypedDict, Unpack

import torch

from lbq.formats.artifact import open_artifact
from lbq.formats.errors import DataError, DeviceError, UsageError
from lbq.formats.manifest import QuantizedModule
from lbq.formats.spec import ModelSpec
from lbq.runtime.ahead import Job, compiled_ahead, job_for
from lbq.runtime.binding import Bound, KernelUse, Weights, bind
from lbq.runtime.cache import name_of
from lbq.runtime.decoder import Decoder
from lbq.runtime.devices import CacheKind, CudaDevice, Device, device_errors, find_device, set_threads
from lbq.runtime.engines import EnginePool
from lbq.runtime.explain import Explanation, explain
from lbq.runtime.needs import needs
from lbq.runtime.text.batch import Request, batch_texts
from lbq.runtime.text.chat import ChatTemplate, Message, require_template
from lbq.runtime.text.generation import (
    Engine,
    Finish,
    GenerationDefaults,
    GenerationOptions,
    check_room,
    stream_text,
)
from lbq.runtime.text.sampling import SEEDS, BrokenLogitsError
from lbq.runtime.text.session import ChatSession
from lbq.runtime.text.tokenizer import Tokenizer

Prompt = str | Sequence[Message]
SLOTS = 256  # tokens that a text's keys and values are allocated by, among several


class GenerationSettings(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``.

    What is left out or None is as ``generation_config.json`` has it.
    """

    max_tokens: int | None  # None: until the context is full
    stop: str | Sequence[str] | None
    temperature: float | None  # 0: the most probable token every time
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


class LoadSettings(TypedDict, total=False):
    """Keyword arguments of everything that loads a model: where it runs and how.

    ``dtype="float32"`` is the reference mode: float32 activations and products, slow. ``context``: the most tokens of a
    text, at most the model's; by default the model's on the CPU, where the cache grows as needed, and on a GPU as many
    of at most 8192 as fit its memory. ``strict`` refuses kernels that are not the fast path, and a GPU that is there
    and not used. ``threads`` is torch's number of threads, for the whole process. ``kv_cache="int8"`` keeps keys and
    values in half the memory of the GPU's float16, a quarter of the CPU's float32, and less exactly, ``"int4"`` in
    half of that and far less exactly; ``"float"`` never does; ``"auto"`` keeps them in int8 on a GPU for a ``context``
    of more than 8192 tokens.
    """

    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32"]
    context: int | None
    strict: bool
    threads: int | None
    kv_cache: CacheKind


class ModelWeights(Weights, Protocol):
    """Weights, and the folder that holds the tokenizer, chat template and generation settings that go with them."""

    @property
    def folder(self) -> Path: ...

    @property
    def quantized(self) -> Mapping[str, QuantizedModule]:
        """The linear layers that are codes."""
        ...

    def close(self) -> None:
        """Give back what nobody uses any more."""
        ...


@dataclass(frozen=True)
class CacheUse:
    """How keys and values are kept; ``fallback``: why they are not read like that, or None where they are."""

    dtype: str  # float16, float32, int8, int4
    fallback: str | None


@dataclass(frozen=True)
class Result:
    """A generated text and how it ended.

    ``error``: what ended it before its time, where it was one of several texts and the others went on; ``text`` is what
    there was until then, and ``finish.reason`` is "error".
    """

    text: str
    finish: Finish
    error: DataError | None = None


class TextStream(Iterator[str]):
    """Pieces of a text as they come; ``finish`` is set after the last, also where an error ends the text."""

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
        self._ready: _Ready | None = None
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
        if self._ready is not None:
            return
        start = time.perf_counter()
        with device_errors():
            with compiled_ahead(self._job()):
                self._on.prepare(needs(self.spec, self._weights.quantized, self._on).weights)
                bound = bind(self._weights, self._on)
            step_fallback = self._on.step_fallback(bound.decoder)
            prompt_fallback = self._on.prompt_fallback(bound.decoder)
            if self._strict:
                _refuse_fallbacks(bound.kernels, step_fallback, prompt_fallback)
            context = self._asked_context or self._on.default_context(bound.decoder)
            if self._asked_context is not None:
                self._on.check_context(bound.decoder, context)
            cache = CacheUse(
                name_of(self._on.cache_dtype(context, bound.decoder)),
                self._on.cache_fallback(bound.decoder),
            )
            if self._strict and cache.fallback is not None:
                raise DeviceError(f"{cache.dtype} keys and values: {cache.fallback}; refused under --strict")
        engines = EnginePool(partial(self._on.engine, bound.decoder, context), context)
        self._ready = _Ready(bound, engines, cache, step_fallback, prompt_fallback, time.perf_counter() - start)

    def _job(self) -> Job | None:
        """Kernels that texts will need."""
        of, sampling = self._weights, self.defaults.sampling
        return job_for(of.spec, of.quantized, self._on, self._asked_context, sampling)

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        return self._bound().engines.context

    def kernels(self) -> list[KernelUse]:
        """Which kernel serves which layers, and why where it is not the fast one."""
        return list(self._bound().bound.kernels)

    def explain(self) -> Explanation:
        """Which kernel, tile and path every layer got, and why."""
        return explain(self.spec, self.kernels(), self._on)

    @property
    def cache(self) -> CacheUse:
        """How keys and values are kept."""
        return self._bound().cache

    @property
    def step_fallback(self) -> str | None:
        """Why a GPU does not decode by the fused step, or None where it does and on a CPU."""
        return self._bound().step_fallback

    @property
    def prompt_fallback(self) -> str | None:
        """Why a GPU does not take in prompts by kernels of their own, or None where it does and on a CPU."""
        return self._bound().prompt_fallback

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are held beyond the mapped file."""
        return self._bound().bound.resident_bytes

    @property
    def seconds_to_bind(self) -> float:
        """How long it took to bring the weights to the device."""
        return self._bound().seconds

    def new_engine(self) -> Engine:
        """An engine with an empty state."""
        ready = self._bound()
        with device_errors():
            return self._on.engine(ready.bound.decoder, ready.engines.context)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after each of ``ids``, float32 [T, V], from an empty state. Raises UsageError if they do not fit."""
        with self._bound().engines.engine() as engine:
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
        known = GenerationSettings.__annotations__.keys()
        odd = settings.keys() - known
        if odd:
            raise UsageError(f"unknown settings: {', '.join(sorted(odd))}; there are {', '.join(known)}")
        given = {name: value for name, value in settings.items() if value is not None}
        most, stop = given.pop("max_tokens", None), given.pop("stop", ())
        if not isinstance(stop, str | Sequence):
            raise UsageError(f"stop is {stop!r}: it must be text, or several texts")
        return GenerationOptions(
            max_tokens=most,  # type: ignore[arg-type]
            sampling=replace(self.defaults.sampling, **given),  # type: ignore[arg-type]
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
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
        engines = self._bound().engines  # last what takes time
        check_room(len(ids), engines.context)
        return TextStream(self._items(engines, ids, options, continues_text=not self._chats(prompt, chat)))

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
        context = self._bound().engines.context
        for i, one in enumerate(ids):
            check_room(len(one), context, what=f"prompt {i + 1}" if len(ids) > 1 else "the prompt")
        requests = [Request(one, _numbered(options, i)) for i, one in enumerate(ids)]
        continues = [not self._chats(prompt, chat) for prompt in prompts]
        return self._batch_items(requests, continues, places)

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
            self._bound().engines, self.tokenizer, self.template, options, self.end_ids, system=system, think=think
        )

    def _chats(self, prompt: Prompt, chat: bool | None) -> bool:
        if not isinstance(prompt, str):
            if chat is False:
                raise UsageError("chat messages need the chat template; pass a text to have it continued")
            return True
        return self.template is not None if chat is None else chat

    def _items(
        self, engines: EnginePool, ids: list[int], options: GenerationOptions, *, continues_text: bool
    ) -> Generator[str | Finish, None, None]:
        with engines.engine() as engine:
            held = engine.reusable(ids, options)
            yield from stream_text(
                engine, self.tokenizer, ids, options, self.end_ids, held=held, continues_text=continues_text
            )

    def _batch_items(
        self, requests: Sequence[Request], continues: Sequence[bool], places: int | None
    ) -> Generator[tuple[int, Result], None, None]:
        ready, decoder = self._bound(), self._bound().bound.decoder
        wanted = len(requests) if places is None else min(places, len(requests))
        slots = min(
            ready.engines.context, max((_slots(request, ready.engines.context) for request in requests), default=1)
        )
        self._refuse_turns(decoder, wanted)
        with device_errors():
            wanted = 1 if wanted <= 1 else min(wanted, self._on.most_places(decoder, slots))
        if wanted <= 1:
            for i, (request, on) in enumerate(zip(requests, continues, strict=True)):
                items = self._items(ready.engines, list(request.ids), request.options, continues_text=on)
                yield i, _whole(TextStream(items))
            return
        with device_errors():
            batch = self._on.batch(decoder, slots, wanted)
            for i, text, finish in batch_texts(batch, self.tokenizer, requests, self.end_ids, continues=continues):
                yield i, Result(text, finish, BrokenLogitsError() if finish.reason == "error" else None)

    def _refuse_turns(self, decoder: Decoder, places: int) -> None:
        """Under ``strict``: raise DeviceError for a GPU on which several texts would take turns."""
        if not (self._strict and isinstance(self._on, CudaDevice)) or self._on.exact or places <= 1:
            return
        turns = self._on.batch_fallback(decoder, 2)
        if turns is not None:
            raise DeviceError(f"texts are decoded one after the other, because {turns}; refused under --strict")

    def _bound(self) -> _Ready:
        self.bind()
        assert self._ready is not None
        return self._ready


def _numbered(options: GenerationOptions, i: int) -> GenerationOptions:
    """Those of text ``i`` of several: with a seed of its own."""
    seed = options.sampling.seed
    return replace(options, sampling=replace(options.sampling, seed=None if seed is None else (seed + i) % SEEDS))


def _whole(stream: TextStream) -> Result:
    """A text to its end, which may be broken logits."""
    pieces: list[str] = []
    error = None
    try:
        for piece in stream:
            pieces.append(piece)  # noqa: PERF402  what there is when it raises is kept
    except BrokenLogitsError as raised:
        error = raised
    assert stream.finish is not None
    return Result("".join(pieces), stream.finish, error)


def _slots(request: Request, context: int) -> int:
    """Tokens that the text of ``request`` may come to, in whole steps of memory."""
    most = request.options.max_tokens
    return context if most is None else -(-(len(request.ids) + most) // SLOTS) * SLOTS


@dataclass(frozen=True)
class _Ready:
    """What a model has once its weights are bound."""

    bound: Bound
    engines: EnginePool
    cache: CacheUse
    step_fallback: str | None
    prompt_fallback: str | None
    seconds: float  # that binding took


def load(path: Path | str, **settings: Unpack[LoadSettings]) -> Model:
    """Map the artifact in ``path`` and bind it to a device.

    Raises StorageError and DataError for the folder, UsageError for arguments, DeviceError for the device.
    """
    return bind_now(open_model(path, **settings))


def open_model(path: Path | str, **settings: Unpack[LoadSettings]) -> Model:
    """As :func:`load`, but the weights are bound when they are first needed: what is wrong before is said at once."""
    return open_weights(lambda _: open_artifact(path), **settings)


def open_weights(
    open_on: Callable[[torch.device], ModelWeights],
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32"] = "auto",
    context: int | None = None,
    strict: bool = False,
    threads: int | None = None,
    kv_cache: CacheKind = "auto",
) -> Model:
    """A model of whatever weights ``open_on`` opens for a device; they are bound when they are first needed."""
    if dtype not in ("auto", "float32"):
        raise UsageError(f"dtype {dtype}: auto or float32")
    if threads is not None:
        set_threads(threads)
    where = find_device(device, exact=dtype == "float32", kv_cache=kv_cache)
    if strict and where.note is not None:
        raise DeviceError(f"{where.note}; refused under --strict")
    weights = open_on(where.device)
    try:
        most = weights.spec.context
        if context is not None and not (isinstance(context, int) and 1 <= context <= most):
            raise UsageError(f"context {context}: {weights.folder} was made for 1 to {most} tokens")
        where.check_cache(weights.spec)
        return Model(weights, where, context, strict=strict)
    except BaseException:
        weights.close()
        raise


def bind_now(model: Model) -> Model:
    """The same model once its weights are bound; it is closed where that fails."""
    try:
        model.bind()
    except BaseException:
        model.close()
        raise
    return model


def _refuse_fallbacks(kernels: Sequence[KernelUse], step: str | None, prompts: str | None) -> None:
    slow = [use for use in kernels if use.fallback is not None]
    if slow:
        first = slow[0]
        more = f" (and {len(slow) - 1} more)" if len(slow) > 1 else ""
        raise DeviceError(f"{first.units}: {first.kernel}, because {first.fallback}{more}; refused under --strict")
    if step is not None:
        raise DeviceError(f"tokens are decoded kernel by kernel, because {step}; refused under --strict")
    if prompts is not None:
        raise DeviceError(f"prompts go by torch's attention, because {prompts}; refused under --strict")
