"""Decode as ``lbq run`` does it, with a clock beside it, and check what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lbq.formats.spec import ModelSpec
from lbq.runtime.bench.memory import Peak
from lbq.runtime.bench.reference import Check, check, reference_logits
from lbq.runtime.binding import Weights
from lbq.runtime.cache import DecoderState, KVCache, MixerState
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.text.generation import Engine, GenerationOptions, generate_tokens
from lbq.runtime.text.sampling import SamplingOptions


@dataclass(frozen=True)
class Workload:
    """``prompt`` tokens at once, ``new`` ones, one text, ``rounds`` times after one that is not counted.

    Tokens are the most probable ones, or with ``sampled`` drawn with temperature, top-k and top-p, the same every time.
    """

    prompt: int = 128
    new: int = 256
    rounds: int = 5
    sampled: bool = False

    @property
    def sampling(self) -> SamplingOptions:
        """How tokens are chosen."""
        return SamplingOptions(temperature=0.7, top_k=20, top_p=0.95, seed=1) if self.sampled else SamplingOptions()


@dataclass(frozen=True)
class Speed:
    """Tokens a second behind the first new token, over the rounds."""

    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class Decoded:
    """What one case gave. Seconds to the first token are a prompt's; ``cold``: of the first round, in which kernels are
    compiled or loaded and graphs captured. ``cache_bytes``: keys and values that the middle new token reads, kept as
    ``cache_dtype``."""

    speed: Speed
    first_token_seconds: float
    cold_seconds: float
    peak_bytes: int
    cache_bytes: int
    cache_dtype: str
    check: Check


class Place(Protocol):
    """Where a decoder runs: a :class:`lbq.runtime.devices.Device`."""

    @property
    def device(self) -> torch.device: ...

    def engine(self, decoder: Decoder, context: int) -> Engine: ...


@dataclass(frozen=True)
class _Round:
    first: float  # seconds
    rest: float
    tokens: list[int]


def decode(weights: Weights, decoder: Decoder, place: Place, load: Workload, depth: int = 0) -> Decoded:
    """Decode behind ``depth`` tokens of random keys and values; ``decoder`` is bound to ``weights`` on ``place``."""
    peak = Peak(place.device)
    engine = place.engine(decoder, depth + load.prompt + load.new)
    held = hold(engine, depth)
    random = torch.Generator().manual_seed(depth + 1)
    ids = torch.randint(0, decoder.spec.vocab_size, (load.prompt,), generator=random).tolist()
    rounds = [_round(engine, ids, depth, load, place.device) for _ in range(1 + load.rounds)]
    logits = engine.decode(rounds[-1].tokens[-1]).clone()
    most = peak.nbytes()
    new = rounds[-1].tokens
    expected = reference_logits(weights, place.device, [*ids, *new], load.new + 1, held if depth else None)
    rates = [(load.new - 1) / one.rest for one in rounds[1:]]
    return Decoded(
        Speed(statistics.median(rates), min(rates), max(rates)),
        statistics.median(one.first for one in rounds[1:]),
        rounds[0].first,
        most,
        round(sum(read_bytes(decoder.spec, held, depth + load.prompt + (load.new - 1) / 2))),
        _dtype(held),
        check(logits, new, expected, repeats=all(one.tokens == new for one in rounds), greedy=not load.sampled),
    )


def _round(engine: Engine, ids: Sequence[int], depth: int, load: Workload, device: torch.device) -> _Round:
    options = GenerationOptions(max_tokens=load.new, sampling=load.sampling)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    stream = generate_tokens(engine, [0] * depth + list(ids), options, (), held=depth)
    tokens = [next(stream)]
    first = time.perf_counter()
    tokens += stream
    return _Round(first - began, time.perf_counter() - first, tokens)


def hold(engine: Engine, depth: int, seed: int = 3) -> DecoderState:
    """Let ``engine`` hold ``depth`` tokens of random keys and values; its state, whose length stays at ``depth``."""
    assert isinstance(engine, DecoderEngine)
    state = engine._state
    random = torch.Generator(engine._decoder.device).manual_seed(seed)
    for cache in state.layers:
        assert isinstance(cache, KVCache)
        cache.reserve(depth)
        part = cache.kv[:, :, :depth]
        if cache.scales is None:
            part.normal_(generator=random)
        else:
            part.random_(-127, 128, generator=random)
            cache.scales[:, :, :depth].uniform_(0.008, 0.024, generator=random)  # values as large as a normal's
            assert cache.turn is not None
            cache.scales[0, :, :depth] *= cache.turn.size**0.5
    state.length = depth
    return DecoderState(state.context, state.layers, depth)


def read_bytes(spec: ModelSpec, state: DecoderState, position: float) -> list[float]:
    """Bytes of keys and values that the token at ``position`` reads in each layer, its own among them."""
    return [
        _slot_bytes(cache) * min(position + 1, spec.layer(i).mixer.window or position + 1)
        for i, cache in enumerate(state.layers)
    ]


def _dtype(state: DecoderState) -> str:
    cache = state.layers[0]
    assert isinstance(cache, KVCache)
    return str(cache.kv.dtype).removeprefix("torch.")


def _slot_bytes(cache: MixerState) -> float:
    assert isinstance(cache, KVCache)
    return cache.nbytes / cache.kv.shape[2]
