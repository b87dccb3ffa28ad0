"""The units of a decoder's keys: see ``turn``. What is large in keys and queries hangs on weights and biases far more
than on the text, so a text of random tokens tells it, and every text is served by the same units."""

from __future__ import annotations

import torch
from torch.nn import functional

from lbq.runtime.attention import AttentionMixer
from lbq.runtime.decoder import Decoder
from lbq.runtime.step import HostStep
from lbq.runtime.turn import Turn

TOKENS = 256


@torch.inference_mode()
def measure_units(decoder: Decoder) -> None:
    """Give every layer's attention the turn of its keys, where it has none yet."""
    mixers = [layer.mixer for layer in decoder.layers if isinstance(layer.mixer, AttentionMixer)]
    if all(mixer.turn is not None for mixer in mixers):
        return
    tokens = min(TOKENS, decoder.spec.context)
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, decoder.spec.vocab_size, (tokens,), generator=random).to(decoder.device)
    state, step = decoder.new_state(tokens), HostStep(0, tokens, decoder.device)
    x = functional.embedding(ids, decoder.embedding).to(torch.float32)
    for layer, layer_state in zip(decoder.layers, state.layers, strict=True):
        if isinstance(layer.mixer, AttentionMixer):
            layer.mixer.turn = Turn.of(_units(layer.mixer, layer.mixer_norm(x)))
        layer(x, layer_state, step)


def _units(mixer: AttentionMixer, x: torch.Tensor) -> torch.Tensor:
    """√(|k| / |q|) of each element by root mean squares over the tokens; the same for two that rope turns together."""
    spec = mixer.spec
    q, k, _ = mixer.heads(x).split((spec.heads, spec.kv_heads, spec.kv_heads), dim=1)
    sizes = [_size(part.reshape(x.shape[0], spec.kv_heads, -1, spec.head_dim), spec.rope.dims) for part in (q, k)]
    units = (sizes[1] / sizes[0]).sqrt()
    return torch.where((units > 0) & units.isfinite(), units, 1.0)


def _size(heads: torch.Tensor, dims: int) -> torch.Tensor:
    """Root mean squares [kv_heads, dim] of [T, kv_heads, ·, dim], over pairs in the first ``dims``."""
    squares = heads.float().square().mean((0, 2))
    half = dims // 2
    pairs = (squares[:, :half] + squares[:, half:dims]) / 2
    return torch.cat((pairs, pairs, squares[:, dims:]), dim=1).sqrt()
