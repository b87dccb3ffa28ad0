"""A fused step and the choice of the tokens behind it, as CUDA graphs: one for each way to attend and to choose."""

from __future__ import annotations

import torch

from lbq.runtime.cache import DecoderState, KVCache
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.kernels.sample import Chain, Choice, choose

WARM_UP = 2  # runs before a capture: kernels are compiled then


class StepGraphs:
    """Launches ``step`` at what ``chain`` holds."""

    def __init__(self, step: FusedStep, chain: Chain, state: DecoderState, *, pdl: bool, graphs: bool) -> None:
        """``graphs=False`` launches kernel by kernel, on any device."""
        self._step, self._chain, self._state, self._pdl = step, chain, state, pdl
        self._use_graphs = graphs
        packed = any(isinstance(cache, KVCache) and cache.scales is not None for cache in state.layers)
        self._until = 0 if packed else step.short_until  # caches of few bits have one way for texts of any length
        self._graphs: dict[tuple[Choice | None, bool], torch.cuda.CUDAGraph] = {}

    def launch(self, choice: Choice | None, position: int) -> None:
        """A step at the position that the chain holds, of several texts the highest, and the choice of the next token,
        if any."""
        short = position < self._until
        if not self._use_graphs:
            self.run(choice, short)
            return
        if (choice, short) not in self._graphs:
            self._graphs[choice, short] = self._captured(choice, short)
        self._graphs[choice, short].replay()

    def run(self, choice: Choice | None, short: bool) -> None:
        """The same kernel by kernel, attending as to a short text or not."""
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
                self.run(choice, short)
            for to, was in zip((chain.token, chain.position, chain.seen), kept, strict=True):
                to.copy_(was)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(choice, short)
        return graph
