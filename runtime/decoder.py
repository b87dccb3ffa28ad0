"""One decoder for every model: what it computes is the spec's, what it computes with is the binding's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

from lbq.formats.spec import GatedMlp, ModelSpec
from lbq.runtime.cache import DecoderState, MixerState
from lbq.runtime.kernels.linear import Linear
from lbq.runtime.norm import RmsNorm
from lbq.runtime.step import HostStep, Step

CHUNK = 512  # prompt tokens at a time: bounds the scratch of scores and of the feed-forward block

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Mixer(Protocol):
    """What mixes tokens with those before them."""

    def new_state(self, context: int, *, dtype: torch.dtype, device: torch.device, fixed: bool) -> MixerState:
        """A state that has seen nothing, for up to ``context`` tokens."""
        ...

    def __call__(self, x: torch.Tensor, state: MixerState, step: Step) -> torch.Tensor:
        """float32 [T, hidden] → float32 [T, hidden]; ``state`` takes the T tokens in."""
        ...


class Layers(Protocol):
    """Takes many tokens through all layers of a decoder."""

    chunk: int  # tokens at a time, at most

    def __call__(self, ids: torch.Tensor, state: DecoderState, *, every: bool) -> torch.Tensor:
        """Token ids, int64 [T ≤ chunk], behind the ``state.length`` that ``state`` holds; the length stays as it is.

        Returns the residual stream behind the last layer, float32 [T, hidden]; without ``every`` it may be the last
        token's alone, [1, hidden].
        """
        ...


class Mlp:
    """down(act(gate(x)) · up(x))."""

    def __init__(self, spec: GatedMlp, gate_up: Linear, down: Linear) -> None:
        self.activation = spec.activation
        self._activate = ACTIVATIONS[spec.activation]
        self._width = spec.down.in_features
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [T, hidden] → float32 [T, hidden]."""
        gate, up = self.gate_up(x).split(self._width, dim=1)
        return self.down(self._activate(gate).mul_(up))


class DecoderLayer:
    """x += mixer(norm(x)); x += mlp(norm(x))."""

    def __init__(self, mixer_norm: RmsNorm, mixer: Mixer, mlp_norm: RmsNorm, mlp: Mlp) -> None:
        self.mixer_norm, self.mixer, self.mlp_norm, self.mlp = mixer_norm, mixer, mlp_norm, mlp

    def __call__(self, x: torch.Tensor, state: MixerState, step: Step) -> None:
        """Update the residual stream [T, hidden] in place."""
        x.add_(self.mixer(self.mixer_norm(x), state, step))
        x.add_(self.mlp(self.mlp_norm(x)))


class Decoder:
    """Token ids to logits. The residual stream and all activations between kernels are float32."""

    def __init__(
        self, spec: ModelSpec, embedding: torch.Tensor, layers: list[DecoderLayer], norm: RmsNorm, head: Linear
    ) -> None:
        self.spec = spec
        self.device = embedding.device
        self.embedding, self.layers, self.norm, self.head = embedding, layers, norm, head

    def new_state(
        self, context: int | None = None, *, dtype: torch.dtype = torch.float32, fixed: bool = False
    ) -> DecoderState:
        """An empty sequence for up to ``context`` tokens (default: the model's); ``fixed``: see KVCache."""
        context = context or self.spec.context
        make = (layer.mixer.new_state(context, dtype=dtype, device=self.device, fixed=fixed) for layer in self.layers)
        return DecoderState(context, list(make))

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, state: DecoderState, *, all_logits: bool = False, layers: Layers | None = None
    ) -> torch.Tensor:
        """Append token ids, int64 [T], to ``state``.

        Returns the logits after the last token, float32 [V], or with ``all_logits`` after each, [T, V]. T may be any
        length up to what ``state`` has left; CHUNK tokens are computed at a time, or as many as ``layers`` takes, which
        stands in for the layers' own way.
        """
        total = ids.shape[0]
        assert 1 <= total <= state.context - state.length
        every = torch.empty(total, self.spec.vocab_size, device=self.device) if all_logits else None
        done = 0
        for chunk in ids.split(CHUNK if layers is None else layers.chunk):
            length = chunk.shape[0]
            if layers is None:
                x = self._hidden(chunk, state, HostStep(state.length, length, self.device))
            else:
                x = layers(chunk, state, every=all_logits)
            state.length += length
            if every is not None:
                for part in x.split(CHUNK):
                    every[done : done + part.shape[0]] = self._logits(part)
                    done += part.shape[0]
        return self._logits(x[-1:])[0] if every is None else every

    @torch.inference_mode()
    def step(self, token: torch.Tensor, state: DecoderState, step: Step) -> torch.Tensor:
        """One token, int64 [1], at the position ``step`` says: logits, float32 [V]. ``state.length`` stays as it is.

        Nothing here depends on values on the host, so a CUDA graph can capture it.
        """
        return self._logits(self._hidden(token, state, step))[0]

    def _hidden(self, ids: torch.Tensor, state: DecoderState, step: Step) -> torch.Tensor:
        x = functional.embedding(ids, self.embedding).to(torch.float32)  # [T, hidden]
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            layer(x, layer_state, step)
        return x

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))
