"""Decode as ``lbq run`` does it, with a clock beside it, and check what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lbq.formats.spec import ModelSpec
from lbq.runtime.bench.memory import Peak
from lbq.runtime.bench.reference import Check, check, reference_logits, worst
from lbq.runtime.binding import Weights
from lbq.runtime.cache import DecoderState, KVCache, MixerState, name_of
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.text.batch import BROKEN, Batch
from lbq.runtime.text.generation import Engine, GenerationOptions, generate_tokens
from lbq.runtime.text.sampling import BrokenLogitsError, SamplingOptions


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
    """Tokens a second behind the first new token, of all texts together, over the rounds."""

    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class Decoded:
    """What one case gave. Seconds to the first token are a prompt's, or all prompts'; ``cold``: of the first round, in
    which kernels are compiled or loaded and graphs captured. ``cache_bytes``: keys and values that the middle step
    reads, kept as ``cache_dtype``. ``batch_fallback``: why several texts do not share a pass over the weights."""

    speed: Speed
    first_token_seconds: float
    cold_seconds: float
    peak_bytes: int
    cache_bytes: int
    cache_dtype: str
    check: Check
    batch_fallback: str | None = None


class Place(Protocol):
    """Where a decoder runs: a :class:`lbq.runtime.devices.Device`."""

    @property
    def device(self) -> torch.device: ...

    def engine(self, decoder: Decoder, context: int) -> Engine: ...

    def batch(self, decoder: Decoder, context: int, places: int) -> Batch: ...


@dataclass(frozen=True)
class _Round:
    first: float  # seconds
    rest: float
    tokens: list[list[int]]  # of each text


def decode(weights: Weights, decoder: Decoder, place: Place, load: Workload, depth: int = 0, texts: int = 1) -> Decoded:
    """Decode behind ``depth`` tokens of random keys and values, ``texts`` of them together; ``decoder`` is bound to
    ``weights`` on ``place``. Figures are of all texts together, the check is that of the worst."""
    peak, context = Peak(place.device), depth + load.prompt + load.new
    running = _One(place.engine(decoder, context)) if texts == 1 else _Several(place.batch(decoder, context, texts))
    held = [hold(engine, depth, seed) for seed, engine in enumerate(running.engines, 3)]
    prompts = [_prompt(decoder, load, depth + 1 + i) for i in range(texts)]
    rounds = [_round(running, prompts, depth, load, place.device) for _ in range(1 + load.rounds)]
    new = rounds[-1].tokens
    logits = running.last_logits(new).clone()
    most = peak.nbytes()
    checks = []
    for i, (ids, text) in enumerate(zip(prompts, new, strict=True)):
        expected = reference_logits(weights, place.device, [*ids, *text], load.new + 1, held[i])
        repeats = all(one.tokens[i] == text for one in rounds)
        checks.append(check(logits[i], text, expected, repeats=repeats, greedy=not load.sampled))
    rates = [texts * (load.new - 1) / one.rest for one in rounds[1:]]
    return Decoded(
        Speed(statistics.median(rates), min(rates), max(rates)),
        statistics.median(one.first for one in rounds[1:]),
        rounds[0].first,
        most,
        round(texts * sum(read_bytes(decoder.spec, held[0], depth + load.prompt + (load.new - 1) / 2))),
        _dtype(held[0]),
        worst(checks),
        running.fallback,
    )


def _prompt(decoder: Decoder, load: Workload, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, decoder.spec.vocab_size, (load.prompt,), generator=random).tolist()
    return ids


class _One:
    """A text by an engine."""

    fallback: str | None = None

    def __init__(self, engine: Engine) -> None:
        self.engines = [engine]

    def tokens(self, prompts: Sequence[Sequence[int]], depth: int, load: Workload) -> Iterator[list[int]]:
        """The next token of each text."""
        options = GenerationOptions(max_tokens=load.new, sampling=load.sampling)
        for token in generate_tokens(self.engines[0], [0] * depth + list(prompts[0]), options, (), held=depth):
            yield [token]

    def last_logits(self, new: Sequence[Sequence[int]]) -> torch.Tensor:
        """Behind all tokens, float32 [texts, V]."""
        return self.engines[0].decode(new[0][-1]).unsqueeze(0)


class _Several:
    """Texts that take their steps together."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self.fallback = batch, batch.fallback
        self.engines = list(batch.engines)

    def tokens(self, prompts: Sequence[Sequence[int]], depth: int, load: Workload) -> Iterator[list[int]]:
        for place, ids in enumerate(prompts):
            self._batch.begin(place, ids, load.sampling, held=depth)
        for i in range(load.new):
            tokens = [token for token in self._batch.tokens(more=i + 1 < load.new) if token is not None]
            if BROKEN in tokens:
                raise BrokenLogitsError
            yield tokens

    def last_logits(self, new: Sequence[Sequence[int]]) -> torch.Tensor:  # noqa: ARG002
        self._batch.step()
        return self._batch.logits


def _round(
    running: _One | _Several, prompts: Sequence[Sequence[int]], depth: int, load: Workload, device: torch.device
) -> _Round:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    steps = running.tokens(prompts, depth, load)
    tokens = [next(steps)]
    first = time.perf_counter()
    tokens += steps
    return _Round(first - began, time.perf_counter() - first, [list(text) for text in zip(*tokens, strict=True)])


def hold(engine: Engine, depth: int, seed: int = 3) -> DecoderState:
    """Let ``engine`` hold ``depth`` tokens of random keys and values; its state, whose length stays at ``depth``."""
    assert isinstance(engine, DecoderEngine)
    state = engine._state
    random = torch.Generator(engine._decoder.device).manual_seed(seed)
    for cache in state.layers:
        assert isinstance(cache, KVCache)
        cache.reserve(depth)
        fill(cache, depth, random)
    state.length = depth
    return DecoderState(state.context, state.layers, depth)


def fill(cache: KVCache, length: int, random: torch.Generator) -> None:
    """Random keys and values, as large as a normal's, in the first ``length`` slots."""
    part = cache.kv[:, :, :length]
    if cache.scales is None or cache.turn is None:
        part.normal_(generator=random)
        return
    eight = cache.kv.dtype == torch.int8
    part.random_(*((-127, 128) if eight else (0, 256)), generator=random)
    scales = cache.scales[:, :, :length].uniform_(*((0.008, 0.024) if eight else (0.12, 0.36)), generator=random)
    scales[: 1 if eight else 2] *= cache.turn.size**0.5  # what is turned is longer


def read_bytes(spec: ModelSpec, state: DecoderState, position: float) -> list[float]:
    """Bytes of keys and values that the token at ``position`` reads in each layer, its own among them."""
    return [
        _slot_bytes(cache) * min(position + 1, spec.layer(i).mixer.window or position + 1)
        for i, cache in enumerate(state.layers)
    ]


def _dtype(state: DecoderState) -> str:
    cache = state.layers[0]
    assert isinstance(cache, KVCache)
    return name_of(cache.kv.dtype)


def _slot_bytes(cache: MixerState) -> float:
    assert isinstance(cache, KVCache)
    return cache.nbytes / cache.kv.shape[2]
