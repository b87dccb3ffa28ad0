"""Several texts at a time on a CUDA device: one fused step for all of them, tokens chosen and fed back there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

import torch

from lbq.runtime.cache import PACKED, DecoderState, MixerState
from lbq.runtime.decoder import Decoder, Layers
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.fused.engine import default_plan, set_choice
from lbq.runtime.fused.graphs import StepGraphs
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.kernels.sample import Chain, Choice, choose
from lbq.runtime.key_units import measure_units
from lbq.runtime.text.sampling import SamplingOptions


def state_of(state: DecoderState, text: int) -> DecoderState:
    """The part of one text, on the same memory."""
    return DecoderState(state.context, [_part(layer, text) for layer in state.layers])


def _part(layer: MixerState, text: int) -> MixerState:
    part = copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(part, name, value[text])
    return part


def _stacked(layer: MixerState, texts: int) -> MixerState:
    """An empty state of one text as one of several."""
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(layer, name, value.new_zeros((texts, *value.shape)))
    return layer


def several_state(decoder: Decoder, slots: int, texts: int, dtype: torch.dtype) -> DecoderState:
    """Empty caches of several texts: those of one with an axis of texts in front."""
    if dtype in PACKED:
        measure_units(decoder)
    mixers = (layer.mixer for layer in decoder.layers)
    made = (mixer.new_state(slots, dtype=dtype, device=decoder.device, fixed=True) for mixer in mixers)
    return DecoderState(slots, [_stacked(state, texts) for state in made])


class FusedBatch:
    """A :class:`lbq.runtime.text.batch.Batch` on a decoder for which ``step.why_not(decoder, places)`` is None.

    A place whose text has ended goes on by garbage until a new text takes it: a step costs the same whatever ends. What
    that leaves in slots behind a text, infinities too, is read by nobody: kernels load zeros in their place.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        places: int,
        *,
        cache_dtype: torch.dtype = torch.float16,
        plan: Plan | None = None,
        graphs: bool = True,
        layers: Layers | None = None,
    ) -> None:
        """``graphs=False`` launches the same step kernel by kernel, on any device."""
        plan = plan or default_plan(decoder.device)
        self.context, self.places = context, places
        self.fallback: str | None = None
        self._step = FusedStep(decoder, context, plan, places)
        self._state = several_state(decoder, context, places, cache_dtype)
        self.engines = [
            DecoderEngine(decoder, context, state=state_of(self._state, i), layers=layers) for i in range(places)
        ]
        self._chain = Chain(decoder.spec.vocab_size, context, decoder.device, places)
        self._graphs = StepGraphs(self._step, self._chain, self._state, pdl=plan.pdl, graphs=graphs)
        self._choices: dict[int, Choice] = {}  # of the places in use
        self._next = [0] * places  # the position of the last token chosen
        self._asking = _Asking(self._chain.history)

    @property
    def launches(self) -> int:
        """Kernels a step, without those that choose tokens."""
        return self._step.launches

    @property
    def logits(self) -> torch.Tensor:
        """Of the last step: float32 [places, V]."""
        return self._step.logits.view(self.places, -1)

    def begin(self, place: int, ids: Sequence[int], sampling: SamplingOptions, *, held: int = 0) -> None:
        text, part = self.engines[place], self._chain.of_text(place)
        text._state.length = held
        logits = text.prefill(ids)
        self._choices[place] = set_choice(part, sampling, ids)
        self._next[place] = text.position
        part.start(0, text.position - 1)
        choose(logits, part, self._choices[place])
        self._asking.begin(place, text.position)

    def end(self, place: int) -> None:
        del self._choices[place]
        self._next[place] = 0
        self._chain.of_text(place).start(0, 0)

    def tokens(self, *, more: bool = True) -> list[int | None]:
        self._asking.ask()
        if more:
            self.step()
        return [token if place in self._choices else None for place, token in enumerate(self._asking.read())]

    def step(self) -> None:
        """Launch a step at the tokens chosen last, and the choice of those behind them."""
        self._graphs.launch(_joined(self._choices.values()), max(self._next))
        self._next = [min(at + 1, self.context) for at in self._next]
        self._asking.launched += 1


def _joined(choices: Iterable[Choice]) -> Choice:
    """The kernels that all of ``choices`` need; texts have settings that make those that they do not need idle."""
    chosen = list(choices)
    return Choice(
        sampled=any(c.sampled for c in chosen),
        penalty=any(c.penalty for c in chosen),
        top_k=any(c.top_k for c in chosen),
        top_p=any(c.top_p for c in chosen),
    )


class _Asking:
    """Brings the last token of every text from the device's history to the host, on a stream of its own."""

    def __init__(self, history: torch.Tensor) -> None:
        """``history``: int64 [texts, positions]."""
        self._history = history.view(-1)
        self._width = history.shape[1]
        self._starts = torch.zeros(history.shape[0], dtype=torch.int64, device=history.device)
        self._side = torch.cuda.Stream(history.device) if history.is_cuda else None
        self._done = torch.cuda.Event() if history.is_cuda else None
        self._found = torch.empty(history.shape[0], dtype=torch.int64, pin_memory=history.is_cuda)
        self.launched = 0  # steps; each puts every text's next token behind its last

    def begin(self, text: int, position: int) -> None:
        """The last token of ``text`` is at ``position``."""
        self._starts[text].fill_(text * self._width + position - self.launched)

    def ask(self) -> None:
        """Ask for the tokens that everything launched so far chooses."""
        if self._side is None or self._done is None:
            self._found.copy_(self._last())
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._found.copy_(self._last(), non_blocking=True)
            self._done.record()

    def read(self) -> list[int]:
        """Those asked for."""
        if self._done is not None:
            self._done.synchronize()
        found: list[int] = self._found.tolist()
        return found

    def _last(self) -> torch.Tensor:
        at = (self._starts + self.launched).clamp_(max=self._history.numel() - 1)  # where no text is, it goes on
        return self._history.index_select(0, at)
