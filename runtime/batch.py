"""Several texts where no kernel takes them together: an engine for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lbq.runtime.text.batch import BROKEN
from lbq.runtime.text.generation import Engine
from lbq.runtime.text.sampling import BrokenLogitsError, Sampler, SamplingOptions


class OneByOne:
    """A :class:`lbq.runtime.text.batch.Batch` of engines, whose texts take a step one after the other."""

    def __init__(self, make: Callable[[], Engine], places: int, fallback: str | None) -> None:
        """``make`` gives an engine with an empty state."""
        self._make = make
        self.engines = [make() for _ in range(places)]
        self.places, self.context = places, self.engines[0].context
        self.fallback = fallback
        self._samplers: dict[int, Sampler] = {}
        self._logits: list[torch.Tensor | None] = [None] * self.places
        self._last: list[int | None] = [None] * self.places  # chosen, and not taken in

    @property
    def logits(self) -> torch.Tensor:
        """Of the last step: float32 [places, V]."""
        return torch.stack([logits for logits in self._logits if logits is not None])

    def begin(self, place: int, ids: Sequence[int], sampling: SamplingOptions, *, held: int = 0) -> None:
        engine = self.engines[place]
        engine.truncate(held)
        self._logits[place] = engine.prefill(ids)
        self._samplers[place], self._last[place] = Sampler(sampling, ids), None

    def end(self, place: int) -> None:
        del self._samplers[place]

    def tokens(self, *, more: bool = True) -> list[int | None]:  # noqa: ARG002
        found: list[int | None] = [None] * self.places
        for place, sampler in self._samplers.items():
            self._step(place)
            logits = self._logits[place]
            assert logits is not None
            try:
                found[place] = self._last[place] = sampler.choose(logits)
            except BrokenLogitsError:
                found[place] = BROKEN
                self.engines[place] = self._make()  # keys that overflowed stay in slots that a later text masks
        return found

    def step(self) -> None:
        """Take in the tokens chosen last."""
        for place in self._samplers:
            self._step(place)

    def _step(self, place: int) -> None:
        token = self._last[place]
        if token is not None:
            self._logits[place] = self.engines[place].decode(token)
            self._last[place] = None
