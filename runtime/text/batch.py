"""The generation loop of several texts: each gets a place on the model as one is free, and ends when it ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lbq.runtime.text.detokenize import StreamDecoder
from lbq.runtime.text.generation import Engine, Finish, GenerationOptions, Reason
from lbq.runtime.text.sampling import SamplingOptions
from lbq.runtime.text.stops import StopStrings
from lbq.runtime.text.tokenizer import Tokenizer

BROKEN = -1  # in place of a token: the logits that were to choose it are not finite numbers


class Batch(Protocol):
    """A model with places for several texts, which take their steps together."""

    places: int
    context: int  # the most tokens of a text
    fallback: str | None  # why it does not read the weights once for all of them, if so

    @property
    def engines(self) -> Sequence[Engine]:
        """What holds the text of each place."""
        ...

    @property
    def logits(self) -> torch.Tensor:
        """Of the last step, float32 [places, V], while every place has a text."""
        ...

    def begin(self, place: int, ids: Sequence[int], sampling: SamplingOptions, *, held: int = 0) -> None:
        """Give ``place`` to a text: take in a prompt of at least one token, behind ``held`` tokens that it holds.

        Raises UsageError for ids that do not fit.
        """
        ...

    def end(self, place: int) -> None:
        """The text in ``place`` is not wanted any more."""
        ...

    def tokens(self, *, more: bool = True) -> list[int | None]:
        """The next token of every text, None where there is none, BROKEN where it ends with an error; the device may
        compute the ones behind meanwhile if ``more`` are wanted."""
        ...

    def step(self) -> None:
        """Take in the tokens that were chosen last, where :meth:`tokens` was told that no more are wanted."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it. ``continues``: the text is shown right after it: a leading space counts."""

    ids: Sequence[int]
    options: GenerationOptions
    continues: bool


@dataclass
class _Text:
    """A text that has a place."""

    index: int
    request: Request
    most: int  # tokens
    full: Reason  # why it ends there
    decoder: StreamDecoder
    stops: StopStrings
    began: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    first: float = 0.0  # when its first token was there
    last: float = 0.0
    steps: int = 0

    def push(self, token: int, eos_ids: Collection[int]) -> Reason | None:
        """Take a token; why the text ends with it, if it does."""
        if token == BROKEN:
            return self._ended("error")
        self.last = time.perf_counter()
        self.first = self.first if self.steps else self.last
        self.steps += 1
        if token in eos_ids:
            return self._ended("eos")
        self.tokens.append(token)
        self.pieces.append(self.stops.push(self.decoder.push(token)))
        if self.stops.stopped:
            return "stop"
        return self._ended(self.full) if len(self.tokens) == self.most else None

    def _ended(self, reason: Reason) -> Reason:
        self.pieces.append(self.stops.finish())
        return reason

    def finish(self, reason: Reason) -> Finish:
        return Finish(
            reason=reason,
            prompt_tokens=len(self.request.ids),
            reused_tokens=0,
            tokens=tuple(self.tokens),
            seconds_to_first_token=self.first - self.began if self.steps else 0.0,
            decode_seconds=self.last - self.first,
            decode_steps=max(0, self.steps - 1),
        )


def batch_texts(
    batch: Batch,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    eos_ids: Collection[int],
) -> Generator[tuple[int, str, Finish], None, None]:
    """The texts that follow prompts, each with its number among ``requests``, as they end.

    Prompts must leave room for an answer. A text that waits takes the place of one that has ended; its prompt is taken
    in by itself while the others wait. Times of a text begin with its own prompt.
    """
    waiting = deque(enumerate(requests))
    active: dict[int, _Text] = {}

    def begin(place: int) -> None:
        index, request = waiting.popleft()
        wanted, room = request.options.max_tokens, batch.context - len(request.ids)
        most = room if wanted is None else min(room, wanted)
        decoder, stops = tokenizer.stream(continues_text=request.continues), StopStrings(request.options.stop)
        text = _Text(index, request, most, "length" if most == wanted else "context", decoder, stops)
        batch.begin(place, request.ids, request.options.sampling)
        active[place] = text

    assert all(0 < len(request.ids) < batch.context for request in requests)
    try:
        for place in range(min(batch.places, len(requests))):
            begin(place)
        while active:
            more = bool(waiting) or any(len(text.tokens) + 1 < text.most for text in active.values())
            found = batch.tokens(more=more)
            for place, text in list(active.items()):
                token = found[place]
                assert token is not None
                reason = text.push(token, eos_ids)
                if reason is None:
                    continue
                del active[place]
                batch.end(place)
                yield text.index, "".join(text.pieces), text.finish(reason)
                if waiting:
                    begin(place)
    finally:
        for place in active:
            batch.end(place)
