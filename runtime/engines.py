"""The engines of a model: who uses one, what it holds, and when it is used again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch

from lbq.runtime.devices import device_errors
from lbq.runtime.text.batch import Request
from lbq.runtime.text.generation import Engine, Finish, GenerationOptions, Streams, stream_text
from lbq.runtime.text.result import TextStream
from lbq.runtime.text.sampling import SamplingOptions
from lbq.runtime.text.tokenizer import Tokenizer


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

    def all_logits(self, ids: Sequence[int]) -> torch.Tensor:
        logits = self._engine.all_logits(ids)
        self._ids.extend(ids)
        return logits

    def decode(self, token: int) -> torch.Tensor:
        logits = self._engine.decode(token)
        self._ids.append(token)
        return logits

    def truncate(self, length: int) -> None:
        # First here: interrupted between the two, less may be known than is held, never more.
        del self._ids[length:]
        # Passed on even if nothing changes here: a step that was interrupted may have left more than is known.
        self._engine.truncate(length)

    def reusable(self, ids: Sequence[int], options: GenerationOptions) -> int:
        """How many first tokens of a prompt need not be computed.

        Never all: the last one's logits are wanted. With a seed none: a prompt computed in two parts is rounded
        otherwise than one computed at once, and the same seed is to give the same text.
        """
        if options.sampling.seed is not None:
            return 0
        most = min(len(self._ids), len(ids) - 1)
        return next((i for i in range(most) if self._ids[i] != ids[i]), most)


class TrackedStream(TrackedEngine):
    """The same of an engine that chooses tokens itself: ``generation.Streams``."""

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine, Streams)
        super().__init__(engine)
        self._streams: Streams = engine

    def stream(
        self, logits: torch.Tensor, options: SamplingOptions, prompt: Sequence[int], most: int
    ) -> Generator[int, None, None]:
        last: int | None = None
        for token in self._streams.stream(logits, options, prompt, most):
            if last is not None:
                self._ids.append(last)
            last = token
            yield token


class EnginePool:
    """Gives each text an engine of its own, and keeps one of those not in use. Not for use from several threads."""

    def __init__(self, make: Callable[[], Engine], context: int) -> None:
        """``make`` gives an engine with an empty state for up to ``context`` tokens."""
        self._make = make
        self.context = context
        self.idle: TrackedEngine | None = None

    def stream(self, tokenizer: Tokenizer, request: Request, eos_ids: Collection[int]) -> TextStream:
        """The text that follows a prompt; an engine is taken when it is first read."""
        return TextStream(self._items(tokenizer, request, eos_ids))

    def _items(
        self, tokenizer: Tokenizer, request: Request, eos_ids: Collection[int]
    ) -> Generator[str | Finish, None, None]:
        ids, options = request.ids, request.options
        with self.engine() as engine:
            held = engine.reusable(ids, options)
            yield from stream_text(
                engine, tokenizer, ids, options, eos_ids, held=held, continues_text=request.continues
            )

    @contextmanager
    def engine(self) -> Iterator[TrackedEngine]:
        """An engine that may hold the tokens of an earlier text.

        After an error it is not used again: keys that overflowed stay in slots that a later text masks, and infinity
        times zero is not zero. Errors of the device are DeviceErrors.
        """
        taken, self.idle = self.idle, None
        with device_errors():
            if taken is None:
                made = self._make()
                taken = TrackedStream(made) if isinstance(made, Streams) else TrackedEngine(made)
            try:
                yield taken
            except (GeneratorExit, KeyboardInterrupt):  # the reader stopped; the state is sound up to what is known
                self.idle = taken
                raise
            self.idle = taken
