"""The engine for a CUDA device: a cache that never moves, and each decode step one replay of a CUDA graph.

A graph holds the embedding look-up, all layers and the head for any position below its bucket: token and position are
read from device tensors. Attention looks at the whole bucket under a mask, so there is one graph for each of 256, 512,
1024, … positions, captured when a text first gets there. Prompts run eagerly.
"""

from __future__ import annotations

import torch

from lbq.runtime.decoder import Decoder, Layers
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.step import DeviceStep

BUCKET = 256
WARM_UP = 2  # runs before a capture: kernels are compiled and libraries make their workspaces then


class CudaEngine(DecoderEngine):
    """One text on a decoder whose weights lie on a CUDA device."""

    def __init__(
        self,
        decoder: Decoder,
        context: int,
        *,
        cache_dtype: torch.dtype = torch.float16,
        graphs: bool = True,
        layers: Layers | None = None,
    ) -> None:
        """``graphs=False`` runs the same step without capturing it, on any device."""
        slots = -(-context // BUCKET) * BUCKET
        super().__init__(decoder, context, cache_dtype=cache_dtype, slots=slots, layers=layers)
        device = decoder.device
        self._slots = torch.arange(slots, device=device)
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits = torch.empty(decoder.spec.vocab_size, dtype=torch.float32, device=device)
        self._use_graphs = graphs
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def decode(self, token: int) -> torch.Tensor:
        position = self.position
        assert position < self.context
        self._token.fill_(token)
        self._position.fill_(position)
        bucket = _bucket(position, self._slots.numel())
        if self._use_graphs:
            if bucket not in self._graphs:
                self._graphs[bucket] = self._captured(bucket)
            self._graphs[bucket].replay()
        else:
            self._run(bucket)
        self._state.length = position + 1
        return self._logits

    def _run(self, bucket: int) -> None:
        """The step at the position and token that the device tensors hold. Running it twice changes nothing."""
        step = DeviceStep(self._position, self._slots[:bucket])
        with torch.inference_mode():
            self._logits.copy_(self._decoder.step(self._token, self._state, step))

    def _captured(self, bucket: int) -> torch.cuda.CUDAGraph:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run(bucket)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self._run(bucket)
        return graph


def _bucket(position: int, slots: int) -> int:
    """The least of 256, 512, 1024, … and ``slots`` that holds ``position``."""
    size = BUCKET
    while size <= position:
        size *= 2
    return min(size, slots)
