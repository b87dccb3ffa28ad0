"""The keyword arguments by which callers say how to generate, and the options that a model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

from lbq.formats.errors import UsageError
from lbq.runtime.text.generation import GenerationDefaults, GenerationOptions
from lbq.runtime.text.sampling import SEEDS


class GenerationSettings(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``.

    What is left out or None is as ``generation_config.json`` has it.
    """

    max_tokens: int | None  # None: until the context is full
    stop: str | Sequence[str] | None
    temperature: float | None  # 0: the most probable token every time
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


def options_of(settings: GenerationSettings, defaults: GenerationDefaults) -> GenerationOptions:
    """``settings`` over a model's ``defaults``. Raises UsageError for values that make no sense."""
    known = GenerationSettings.__annotations__.keys()
    odd = settings.keys() - known
    if odd:
        raise UsageError(f"unknown settings: {', '.join(sorted(odd))}; there are {', '.join(known)}")
    given = {name: value for name, value in settings.items() if value is not None}
    most, stop = given.pop("max_tokens", None), given.pop("stop", ())
    if not isinstance(stop, str | Sequence):
        raise UsageError(f"stop is {stop!r}: it must be text, or several texts")
    return GenerationOptions(
        max_tokens=most,  # type: ignore[arg-type]
        sampling=replace(defaults.sampling, **given),  # type: ignore[arg-type]
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def numbered(options: GenerationOptions, i: int) -> GenerationOptions:
    """Those of text ``i`` of several: with a seed of its own."""
    seed = options.sampling.seed
    return replace(options, sampling=replace(options.sampling, seed=None if seed is None else (seed + i) % SEEDS))
