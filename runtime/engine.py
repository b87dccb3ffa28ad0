"""A decoder with the state of one text: the CPU's ``generation.Engine``, and what that of a GPU is built on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lbq.formats.errors import UsageError
from lbq.runtime.cache import PACKED, DecoderState
from lbq.runtime.decoder import Decoder, Layers
from lbq.runtime.key_units import measure_units


class DecoderEngine:
    """One text on one decoder, every step run as it is called. The cache grows with the text unless it is ``fixed``."""

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        *,
        cache_dtype: torch.dtype = torch.float32,
        slots: int | None = None,
        layers: Layers | None = None,
        state: DecoderState | None = None,
    ) -> None:
        """``context``: the most tokens; ``slots``: allocate a cache of this many at once, at least ``context``;
        ``layers``: what takes several tokens through the layers, in place of the decoder's own; ``state``: an empty one
        on memory that is there already."""
        assert slots is None or slots >= context
        self.context = context
        self._decoder = decoder
        self._layers = layers
        if cache_dtype in PACKED and state is None:
            measure_units(decoder)
        self._state = state or decoder.new_state(slots or context, dtype=cache_dtype, fixed=slots is not None)

    @property
    def position(self) -> int:
        """Tokens held."""
        return self._state.length

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """Take in tokens; the logits after the last, float32 [V]. UsageError for ids or a length that do not fit."""
        return self._decoder.forward(self._checked(ids), self._state, layers=self._layers)

    def all_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Take in tokens; the logits after each, float32 [T, V]. UsageError as for :meth:`prefill`."""
        return self._decoder.forward(self._checked(ids), self._state, all_logits=True, layers=self._layers)

    def decode(self, token: int) -> torch.Tensor:
        """Take in one token; the logits after it, float32 [V], valid until the next call."""
        assert self.position < self.context
        return self._decoder.forward(torch.tensor([token], device=self._decoder.device), self._state)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self._state.truncate(length)

    def _checked(self, ids: Sequence[int]) -> torch.Tensor:
        vocabulary = self._decoder.spec.vocab_size
        if not ids:
            raise UsageError("no tokens to take in")
        if min(ids) < 0 or max(ids) >= vocabulary:
            odd = next(i for i in ids if not 0 <= i < vocabulary)
            raise UsageError(f"token id {odd}: the model's ids are 0 to {vocabulary - 1}")
        if self.position + len(ids) > self.context:
            raise UsageError(f"{self.position} + {len(ids)} tokens do not fit into a context of {self.context}")
        return torch.tensor(ids, device=self._decoder.device)
