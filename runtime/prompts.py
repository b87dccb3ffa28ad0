"""All tokens of a prompt's chunk through a decoder's layers on a CUDA device: what ``fused`` is for one token.

A layer is eight launches and four products: norm, q/k/v, heads (norm, rope, cache), attention, operand, output, norm,
gate/up, gate, down; the residual is added by the norm that follows. Each packed matrix is opened once a chunk, so that
chunks are long; in between are float16 and what the residual stream is, float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lbq.runtime.attention import AttentionMixer
from lbq.runtime.cache import DecoderState, KVCache
from lbq.runtime.decoder import Decoder, DecoderLayer
from lbq.runtime.kernels import prompt
from lbq.runtime.kernels.attention import Cache, Heads, Norms
from lbq.runtime.kernels.cuda import BATCH_TOKENS, CudaLinear, DenseCudaLinear
from lbq.runtime.kernels.linear import Linear
from lbq.runtime.kernels.prompt import Operand, Result
from lbq.runtime.norm import RmsNorm
from lbq.runtime.rope import Rotary

CHUNK = 2048  # tokens at a time: opening the weights is a tenth of their products then


def why_not(decoder: Decoder) -> str | None:
    """Why these layers cannot run ``decoder``, in words, or None where they can."""
    for i, layer in enumerate(decoder.layers):
        mixer = layer.mixer
        if not isinstance(mixer, AttentionMixer):
            return f"layer {i} mixes tokens by {type(mixer).__name__}"
        width = 0
        for linear in (mixer.qkv, mixer.out, layer.mlp.gate_up, layer.mlp.down):
            if not isinstance(linear, CudaLinear | DenseCudaLinear) or linear.exact:
                return f"layer {i} runs by {linear.kernel}"
            width = max(width, linear.k)
        trouble = prompt.why_not(Heads.of(mixer.spec), width)
        if trouble is not None:
            return f"layer {i}: {trouble}"
    return None


class PromptLayers:
    """A :class:`lbq.runtime.decoder.Layers` of kernels that a prompt shares. ``why_not(decoder)`` must be None."""

    chunk = CHUNK

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __call__(self, ids: torch.Tensor, state: DecoderState, *, every: bool) -> torch.Tensor:
        """The residual stream behind the last layer, float32 [T, hidden], or [1, hidden] of the last token alone."""
        decoder, start = self._decoder, state.length
        x = functional.embedding(ids, decoder.embedding).to(torch.float32)
        positions = torch.arange(start, start + ids.shape[0], device=decoder.device)
        angles: dict[Rotary, tuple[torch.Tensor, torch.Tensor]] = {}
        y: Result | None = None
        for i, (layer, cache) in enumerate(zip(decoder.layers, state.layers, strict=True)):
            assert isinstance(cache, KVCache)
            assert isinstance(layer.mixer, AttentionMixer)
            rotary = layer.mixer.rotary
            if rotary not in angles:
                angles[rotary] = _angles(rotary, positions)
            last = not every and i == len(decoder.layers) - 1
            x, y = _layer(layer, cache, x, y, start, angles[rotary], last=last)
        prompt.add_norm(x, y, None)
        return x


def _angles(rotary: Rotary, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary.angles(positions)
    return cos.view(positions.shape[0], -1), sin[:, 0, 1].contiguous()


def _layer(
    layer: DecoderLayer,
    cache: KVCache,
    x: torch.Tensor,
    y: Result | None,
    start: int,
    angles: tuple[torch.Tensor, torch.Tensor],
    *,
    last: bool,
) -> tuple[torch.Tensor, Result]:
    """The residual stream x + y through a layer: x, and the result that is still to be added to it.

    ``last``: nobody wants more than the last token's; keys and values are stored of all.
    """
    mixer, tokens = layer.mixer, x.shape[0]
    assert isinstance(mixer, AttentionMixer)
    cache.reserve(start + tokens)
    shape, held = Heads.of(mixer.spec), Cache(cache.kv, cache.scales, cache.turn)
    normed = prompt.add_norm(x, y, _norm(layer.mixer_norm))
    q = prompt.heads(_product(normed, mixer.qkv), shape, _norm(mixer.q_norm), _norm(mixer.k_norm), angles, start, held)
    if last and tokens > 1:
        x, q, start = x[-1:].clone(), q[-1:], start + tokens - 1
    attended = prompt.operand(prompt.attend(q, shape, start, held))
    normed = prompt.add_norm(x, _product(attended, mixer.out), _norm(layer.mlp_norm))
    gated = prompt.gate(_product(normed, layer.mlp.gate_up), layer.mlp.activation)
    return x, _product(gated, layer.mlp.down)


def _product(x: Operand | None, linear: Linear) -> Result:
    assert x is not None
    if isinstance(linear, CudaLinear) and x.values.shape[0] > BATCH_TOKENS:
        return prompt.multiply(x, linear.weight, linear.norms, linear.bias)
    return Result(linear(x.float()))


def _norm(norm: RmsNorm | None) -> Norms | None:
    return None if norm is None else Norms(norm.weight, norm.eps)
