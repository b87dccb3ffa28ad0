"""The engine of the fused step: one CUDA graph for every position, and the choice of tokens on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from lbq.formats.errors import DataError
from lbq.runtime.decoder import Decoder, Layers
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.fused.tables import device_table
from lbq.runtime.kernels.sample import Chain, Choice, choose
from lbq.runtime.text.sampling import BROKEN_LOGITS, SamplingOptions

WARM_UP = 2  # runs before a capture: kernels are compiled then
AHEAD = 1  # steps that run before the reader has seen what they go on from
SEEDS = 1 << 63


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
        self._pdl = plan.pdl
        self._chain = Chain(decoder.spec.vocab_size, context, decoder.device)
        self._use_graphs = graphs
        self._graphs: dict[tuple[Choice | None, bool], torch.cuda.CUDAGraph] = {}

    @property
    def launches(self) -> int:
        """Kernels a step, without those that choose a token."""
        return self._step.launches

    def decode(self, token: int) -> torch.Tensor:
        position = self.position
        assert position < self.context
        self._chain.start(token, position)
        self._launch(None, position)
        self._state.length = position + 1
        return self._step.logits

    def stream(
        self, logits: torch.Tensor, options: SamplingOptions, prompt: Sequence[int], most: int
    ) -> Generator[int, None, None]:
        """At most ``most`` tokens that follow the text held, whose last ``logits`` are given, chosen on the device.

        The device works ahead of the reader: it computes the step after a token while the token is read, and nothing
        waits for the host. At a token, the text held is all before it; going on takes it in. ``prompt``: the ids that
        the repetition penalty is for, beside those chosen. Raises DataError for logits that are not finite.
        """
        start, device = self.position, self._decoder.device
        choice = self._chain.set(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            penalty=options.repetition_penalty,
            seed=torch.Generator().seed() % SEEDS if options.seed is None else options.seed,
            seen=torch.tensor(sorted(set(prompt)), dtype=torch.int64),
        )
        self._chain.start(0, start - 1)
        choose(logits, self._chain, choice)  # the token at ``start``
        most = min(most, self.context - start)
        tokens = _Tail(self._chain.history[0], device)
        tokens.ask(start)
        launched = 0
        for i in range(most):
            while launched < min(i + AHEAD, most - 1):
                self._launch(choice, start + launched)
                launched += 1
                tokens.ask(start + launched)
            token = tokens.read()
            if token < 0:
                raise DataError(BROKEN_LOGITS)
            self._state.length = start + i
            yield token
            self._state.length = min(start + i + 1, start + launched)

    def _launch(self, choice: Choice | None, position: int) -> None:
        """The step at what the chain holds, which is at ``position``, and the choice of the next token, if any."""
        short = position < self._step.short_until
        if not self._use_graphs:
            self._run(choice, short)
            return
        if (choice, short) not in self._graphs:
            self._graphs[choice, short] = self._captured(choice, short)
        self._graphs[choice, short].replay()

    def _run(self, choice: Choice | None, short: bool) -> None:
        logits = self._step.run(self._chain.token, self._chain.position, self._state, short=short)
        if choice is not None:
            choose(logits, self._chain, choice, pdl=self._pdl)

    def _captured(self, choice: Choice | None, short: bool) -> torch.cuda.CUDAGraph:
        chain = self._chain
        kept = [chain.token.clone(), chain.position.clone(), chain.seen.clone()]  # warming up goes on by some tokens
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                chain.position.copy_(kept[1])
                self._run(choice, short)
            for to, was in zip((chain.token, chain.position, chain.seen), kept, strict=True):
                to.copy_(was)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(choice, short)
        return graph


def default_plan(device: torch.device) -> Plan:
    """What was measured on such a GPU, else the rules; with programmatic dependent launch where the GPU has it."""
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return Plan(pdl=pdl, table=device_table(device))


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
