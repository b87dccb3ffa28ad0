"""The generation loop: prompt ids in, tokens or text out, and why it ended."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import msgspec
import torch

from lbq.formats.errors import DataError, UsageError
from lbq.formats.json_file import decode
from lbq.runtime.text.config import TokenId, read_optional
from lbq.runtime.text.sampling import BrokenLogitsError, Sampler, SamplingOptions
from lbq.runtime.text.stops import StopStrings
from lbq.runtime.text.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"
Reason = Literal["stop", "length", "eos", "context", "error"]


class Engine(Protocol):
    """A model with the state of one text."""

    @property
    def context(self) -> int:
        """The most tokens that the state can hold."""
        ...

    @property
    def position(self) -> int:
        """How many tokens the state holds."""
        ...

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """Take in at least one token; the float32 logits [V] that follow the last one."""
        ...

    def all_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Take in at least one token; the float32 logits [T, V] that follow each."""
        ...

    def decode(self, token: int) -> torch.Tensor:
        """Take in one token; the float32 logits [V] that follow it, valid until the next call."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens; ``length`` is at most ``position``."""
        ...


@runtime_checkable
class Streams(Protocol):
    """An engine that chooses tokens itself, and computes the step after one while its reader has it."""

    def stream(
        self, logits: torch.Tensor, options: SamplingOptions, prompt: Sequence[int], most: int
    ) -> Generator[int, None, None]:
        """At most ``most`` tokens that follow what the state holds, whose last ``logits`` are given.

        At a token the state holds all before it; going on takes the token in. ``prompt``: ids that the repetition
        penalty is for. Raises BrokenLogitsError as :class:`Sampler`.
        """
        ...


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate one text. UsageError at construction for values that make no sense."""

    max_tokens: int | None = None  # None: until the context is full
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and not (isinstance(self.max_tokens, int) and self.max_tokens >= 1):
            raise UsageError(f"max_tokens is {self.max_tokens}: it must be an integer of at least 1")
        StopStrings(self.stop)


class _GenerationFile(msgspec.Struct, frozen=True):
    eos_token_id: TokenId | list[TokenId] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampling(self) -> SamplingOptions:
        return SamplingOptions(
            temperature=(1.0 if self.temperature is None else self.temperature) if self.do_sample else 0.0,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's ``generation_config.json`` says: the tokens that end a text, and how to sample."""

    eos_ids: frozenset[int] = frozenset()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    @classmethod
    def load(cls, folder: Path) -> GenerationDefaults:
        """Read the file; without one, no eos ids and greedy. DataError for content that makes no sense.

        As in transformers a model is sampled only where ``do_sample`` is true.
        """
        path = folder / GENERATION_CONFIG
        data = read_optional(path)
        if data is None:
            return cls()
        found = decode(data, _GenerationFile, path)
        eos = found.eos_token_id
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        try:
            return cls(frozenset(ids), found.sampling())
        except UsageError as error:
            raise DataError(f"{path}: {error}") from None

    def end_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end a text: the file's, or where it names none the tokenizer's ``eos_token``."""
        eos = tokenizer.eos_id
        return self.eos_ids or (frozenset() if eos is None else frozenset((eos,)))


@dataclass(frozen=True)
class Finish:
    """How a text ended. Times are of the model and the sampling alone, whatever the reader of the stream did."""

    reason: Reason  # a stop string; max_tokens; an eos token; a full context; logits that are not finite numbers
    prompt_tokens: int
    reused_tokens: int  # of the prompt, held from before and not computed again
    tokens: tuple[int, ...]  # the new ones, without eos
    seconds_to_first_token: float
    decode_seconds: float  # after the first token
    decode_steps: int

    @property
    def tokens_per_second(self) -> float | None:
        """Decode steps a second, or None where there were none."""
        return self.decode_steps / self.decode_seconds if self.decode_steps and self.decode_seconds > 0 else None


def check_room(
    prompt_tokens: int, context: int, *, what: str = "the prompt", advice: str = "shorten the prompt"
) -> None:
    """Raise UsageError for a prompt that is empty or leaves no room for an answer."""
    if prompt_tokens == 0:
        raise UsageError(f"{what} is empty: it has no token to go on from")
    if prompt_tokens >= context:
        raise UsageError(
            f"{what} has {prompt_tokens} tokens and the context holds {context}, the answer included: "
            f"{advice} or load the model with a longer context"
        )


def generate_tokens(
    engine: Engine,
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    eos_ids: Collection[int],
    *,
    held: int = 0,
) -> Generator[int, None, Reason]:
    """Tokens that follow a prompt, without the eos token that ends them; the generator's value says why it ended.

    ``held``: this many first tokens of the prompt are what ``engine`` holds already. Raises UsageError at the call,
    before any work, for a prompt that is empty or leaves no room for an answer.
    """
    check_room(len(prompt_ids), engine.context)
    assert 0 <= held < len(prompt_ids)
    return _tokens(engine, prompt_ids, options, eos_ids, held)


def _tokens(
    engine: Engine,
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    eos_ids: Collection[int],
    held: int,
) -> Generator[int, None, Reason]:
    sampler = Sampler(options.sampling, prompt_ids)
    room = engine.context - len(prompt_ids)
    most = room if options.max_tokens is None else min(room, options.max_tokens)
    engine.truncate(held)
    logits = engine.prefill(prompt_ids[held:])
    full: Reason = "length" if most == options.max_tokens else "context"
    if isinstance(engine, Streams):
        for token in engine.stream(logits, options.sampling, prompt_ids, most):
            if token in eos_ids:
                return "eos"
            yield token
        return full
    for left in range(most - 1, -1, -1):
        token = sampler.choose(logits)
        if token in eos_ids:
            return "eos"
        yield token
        if left:
            logits = engine.decode(token)
    return full


def stream_text(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    eos_ids: Collection[int],
    *,
    held: int = 0,
    continues_text: bool = False,
) -> Generator[str | Finish, None, None]:
    """Text that follows a prompt, in pieces of whole characters, and at the end one :class:`Finish`.

    ``continues_text``: the text is shown right after the prompt's, so that a leading space counts. The other
    arguments and the errors are those of :func:`generate_tokens`. A BrokenLogitsError comes behind a :class:`Finish` of
    what there was until then.
    """
    tokens = generate_tokens(engine, prompt_ids, options, eos_ids, held=held)
    clock = _Clock(tokens)
    decoder = tokenizer.stream(continues_text=continues_text)
    stops = StopStrings(options.stop)

    def pieces() -> Generator[str | Finish, None, None]:
        try:
            while not stops.stopped and (token := clock.next()) is not None:
                if piece := stops.push(decoder.push(token)):
                    yield piece
        except BrokenLogitsError:
            if piece := stops.finish():
                yield piece
            yield clock.finish("error", len(prompt_ids), held)
            raise
        if stops.stopped:
            tokens.close()
        elif piece := stops.finish():
            yield piece
        yield clock.finish("stop" if stops.stopped else clock.reason, len(prompt_ids), held)

    return pieces()


class _Clock:
    """Takes tokens from a generator and the time that each took."""

    def __init__(self, tokens: Generator[int, None, Reason]) -> None:
        self._source = tokens
        self._tokens: list[int] = []
        self._times: list[float] = []  # one for each model step
        self.reason: Reason = "length"

    def next(self) -> int | None:
        began = time.perf_counter()
        try:
            token = next(self._source)
        except StopIteration as end:
            self.reason = end.value
            if self.reason == "eos":  # a step that gave no token
                self._times.append(time.perf_counter() - began)
            return None
        self._times.append(time.perf_counter() - began)
        self._tokens.append(token)
        return token

    def finish(self, reason: Reason, prompt_tokens: int, reused_tokens: int) -> Finish:
        return Finish(
            reason=reason,
            prompt_tokens=prompt_tokens,
            reused_tokens=reused_tokens,
            tokens=tuple(self._tokens),
            seconds_to_first_token=sum(self._times[:1]),  # 0.0 where an error came before it
            decode_seconds=sum(self._times[1:]),
            decode_steps=max(0, len(self._times) - 1),
        )
