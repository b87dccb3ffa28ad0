"""A model's weights bound to a device: what is made of them once, when they are first needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from lbq.formats.errors import DeviceError
from lbq.formats.manifest import QuantizedModule
from lbq.runtime.ahead import compiled_ahead, job_for
from lbq.runtime.binding import Bound, KernelUse, Weights, bind
from lbq.runtime.cache import name_of
from lbq.runtime.decoder import Decoder
from lbq.runtime.devices import Device, device_errors
from lbq.runtime.engines import EnginePool
from lbq.runtime.needs import needs
from lbq.runtime.text.sampling import SamplingOptions


class ModelWeights(Weights, Protocol):
    """Weights, and the folder that holds the tokenizer, chat template and generation settings that go with them."""

    @property
    def folder(self) -> Path: ...

    @property
    def quantized(self) -> Mapping[str, QuantizedModule]:
        """The linear layers that are codes."""
        ...

    def close(self) -> None:
        """Give back what nobody uses any more."""
        ...


@dataclass(frozen=True)
class CacheUse:
    """How keys and values are kept; ``fallback``: why they are not read like that, or None where they are."""

    dtype: str  # float16, float32, int8, int4
    fallback: str | None


@dataclass(frozen=True)
class Ready:
    """What a model has once its weights are bound. Fallbacks are None where everything runs as it is meant to."""

    bound: Bound
    engines: EnginePool
    cache: CacheUse
    step_fallback: str | None
    prompt_fallback: str | None
    seconds: float  # that binding took


def make_ready(
    weights: ModelWeights, device: Device, context: int | None, sampling: SamplingOptions, *, strict: bool
) -> Ready:
    """Bind ``weights`` to ``device`` for texts of up to ``context`` tokens, by default what the device says.

    ``sampling``: how tokens are mostly chosen. ``strict`` refuses what is not the fast path. Raises DataError and
    DeviceError.
    """
    start = time.perf_counter()
    with device_errors():
        with compiled_ahead(job_for(weights.spec, weights.quantized, device, context, sampling)):
            device.prepare(needs(weights.spec, weights.quantized, device).weights)
            bound = bind(weights, device)
        step, prompts = device.step_fallback(bound.decoder), device.prompt_fallback(bound.decoder)
        if strict:
            _refuse_fallbacks(bound.kernels, step, prompts)
        tokens = context or device.default_context(bound.decoder)
        if context is not None:
            device.check_context(bound.decoder, context)
        cache = _cache_use(device, bound.decoder, tokens, strict=strict)
    engines = EnginePool(partial(device.engine, bound.decoder, tokens), tokens)
    return Ready(bound, engines, cache, step, prompts, time.perf_counter() - start)


def _cache_use(device: Device, decoder: Decoder, context: int, *, strict: bool) -> CacheUse:
    cache = CacheUse(name_of(device.cache_dtype(context, decoder)), device.cache_fallback(decoder))
    if strict and cache.fallback is not None:
        raise DeviceError(f"{cache.dtype} keys and values: {cache.fallback}; refused under --strict")
    return cache


def _refuse_fallbacks(kernels: Sequence[KernelUse], step: str | None, prompts: str | None) -> None:
    slow = [use for use in kernels if use.fallback is not None]
    if slow:
        first = slow[0]
        more = f" (and {len(slow) - 1} more)" if len(slow) > 1 else ""
        raise DeviceError(f"{first.units}: {first.kernel}, because {first.fallback}{more}; refused under --strict")
    if step is not None:
        raise DeviceError(f"tokens are decoded kernel by kernel, because {step}; refused under --strict")
    if prompts is not None:
        raise DeviceError(f"prompts go by torch's attention, because {prompts}; refused under --strict")
