"""The engine of the fused step: one CUDA graph for every position, and the choice of tokens on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from lbq.runtime.decoder import Decoder, Layers
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.fused.graphs import StepGraphs
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.fused.tables import device_table
from lbq.runtime.kernels.gpu import gpu_of
from lbq.runtime.kernels.sample import Chain, Choice, choose
from lbq.runtime.text.sampling import SEEDS, BrokenLogitsError, SamplingOptions

AHEAD = 1  # steps that run before the reader has seen what they go on from


class FusedEngine(DecoderEngine):
    """One text on a decoder whose weights lie on a CUDA device. ``step.why_not(decoder)`` must be None.

    Prompts run through the decoder, on the same cache, float16 or int8; it never moves.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        *,
        cache_dtype: torch.dtype = torch.float16,
        plan: Plan | None = None,
        graphs: bool = True,
        layers: Layers | None = None,
    ) -> None:
        """``graphs=False`` launches the same step kernel by kernel, on any device."""
        super().__init__(decoder, context, cache_dtype=cache_dtype, slots=context, layers=layers)
        plan = plan or default_plan(decoder.device)
        self._step = FusedStep(decoder, context, plan)
        self._chain = Chain(decoder.spec.vocab_size, context, decoder.device)
        self._pdl = plan.pdl
        self._graphs = StepGraphs(self._step, self._chain, self._state, pdl=plan.pdl, graphs=graphs)

    @property
    def launches(self) -> int:
        """Kernels a step, without those that choose a token."""
        return self._step.launches

    def decode(self, token: int) -> torch.Tensor:
        position = self.position
        assert position < self.context
        self._chain.start(token, position)
        self._graphs.launch(None, position)
        self._state.length = position + 1
        return self._step.logits

    def stream(
        self, logits: torch.Tensor, options: SamplingOptions, prompt: Sequence[int], most: int
    ) -> Generator[int, None, None]:
        """At most ``most`` tokens that follow the text held, whose last ``logits`` are given, chosen on the device.

        The device works ahead of the reader: it computes the step after a token while the token is read, and nothing
        waits for the host. At a token, the text held is all before it; going on takes it in. ``prompt``: the ids that
        the repetition penalty is for, beside those chosen. Raises BrokenLogitsError for logits that are not finite.
        """
        start, device = self.position, self._decoder.device
        choice = set_choice(self._chain, options, prompt)
        self._chain.start(0, start - 1)
        choose(logits, self._chain, choice, pdl=self._pdl)  # the token at ``start``
        most = min(most, self.context - start)
        tokens = _Tail(self._chain.history[0], device)
        tokens.ask(start)
        launched = 0
        for i in range(most):
            while launched < min(i + AHEAD, most - 1):
                self._graphs.launch(choice, start + launched)
                launched += 1
                tokens.ask(start + launched)
            token = tokens.read()
            if token < 0:
                raise BrokenLogitsError
            self._state.length = start + i
            yield token
            self._state.length = min(start + i + 1, start + launched)

    def rehearse(self, prompts: Sequence[int], ways: Sequence[SamplingOptions]) -> None:
        """Launch what prompts of so many tokens do, and steps that choose in these ``ways``; what was held is lost.

        For decoders on ``meta``: whoever hears of launches knows then which kernels there will be.
        """
        for options in ways:
            for short in (True, False):
                self._graphs.run(set_choice(self._chain, options, ()), short)
        for length in prompts:
            self._state.length = 0
            ids = torch.zeros(min(length, self.context), dtype=torch.int64, device=self._decoder.device)
            self._decoder.forward(ids, self._state, layers=self._layers)


def set_choice(chain: Chain, options: SamplingOptions, prompt: Sequence[int]) -> Choice:
    """Set ``chain`` to choose by ``options`` behind ``prompt``; the kernels that this takes."""
    return chain.set(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        penalty=options.repetition_penalty,
        seed=torch.Generator().seed() % SEEDS if options.seed is None else options.seed,
        seen=torch.tensor(sorted(set(prompt)), dtype=torch.int64),
    )


def default_plan(device: torch.device) -> Plan:
    """What was measured on such a GPU, else the rules; with programmatic dependent launch where the GPU has it."""
    gpu = gpu_of(device)
    return Plan(pdl=gpu is not None and gpu.capability >= (9, 0), table=device_table(device))


@dataclass
class _Asked:
    slot: torch.Tensor
    done: torch.cuda.Event | None


class _Tail:
    """Brings tokens from the device's history to the host on a stream of its own, in the order they are asked for."""

    def __init__(self, history: torch.Tensor, device: torch.device) -> None:
        self._history = history
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._asked: deque[_Asked] = deque()

    def ask(self, position: int) -> None:
        """Ask for the token at ``position``, once everything launched so far has run."""
        token = self._history[position : position + 1]
        if self._side is None:
            self._asked.append(_Asked(token.clone(), None))
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            slot = torch.empty(1, dtype=torch.int64, pin_memory=True)
            slot.copy_(token, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._asked.append(_Asked(slot, done))

    def read(self) -> int:
        """The first of those asked for that was not read yet."""
        asked = self._asked.popleft()
        if asked.done is not None:
            asked.done.synchronize()
        return int(asked.slot)
