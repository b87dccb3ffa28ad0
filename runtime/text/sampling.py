"""From logits to the next token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lbq.formats.errors import DataError, UsageError

SEEDS = 1 << 63  # there are so many
_FIRST_LOOK = 512


class BrokenLogitsError(DataError):
    """Logits that are not finite numbers: the text ends before the token that they were to choose."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite numbers: its weights are broken (lbq verify tells), or on a GPU "
            "its keys and values do not fit the float16 cache (--dtype float32)"
        )


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose a token. The defaults choose the most probable one.

    Raises UsageError at construction for values that make no sense.
    """

    temperature: float = 0.0  # 0: greedy, and the filters below do not matter
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the most probable tokens that together reach p
    min_p: float = 0.0  # keep tokens at least this fraction as probable as the most probable one
    repetition_penalty: float = 1.0  # of tokens in the prompt and the text so far (Keskar et al. 2019)
    seed: int | None = None  # None: another text every time

    def __post_init__(self) -> None:
        for name, most, positive in (
            ("temperature", 100.0, False),
            ("top_p", 1.0, True),
            ("min_p", 1.0, False),
            ("repetition_penalty", 100.0, True),
        ):
            value = getattr(self, name)
            # Comparisons that NaN fails.
            sound = isinstance(value, int | float) and (value > 0.0 if positive else value >= 0.0) and value <= most
            _require(name, value, sound, f"a number {'above' if positive else 'from'} 0, up to {most:g}")
        _require("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "an integer of at least 0")
        seed = self.seed
        sound = seed is None or (isinstance(seed, int) and 0 <= seed < SEEDS)
        _require("seed", seed, sound, "an integer from 0 to 2^63 - 1")


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value!r}: it must be {allowed}")


class Sampler:
    """Chooses the tokens of one text. The same seed, logits and device give the same text."""

    def __init__(self, options: SamplingOptions, prompt: Iterable[int]) -> None:
        """``prompt`` counts for the repetition penalty."""
        self._options = options
        self._seen = set(prompt) if options.repetition_penalty != 1.0 else None
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from float32 logits [V] on any device, which are left as they are.

        Raises BrokenLogitsError if the logits are not numbers: broken weights make such, and so do keys or values
        beyond the range of a float16 cache.
        """
        assert logits.dtype == torch.float32
        assert logits.dim() == 1
        options = self._options
        logits = self._penalize(logits)
        best = logits.max(dim=0)  # NaN where any logit is
        if not math.isfinite(best.values):
            raise BrokenLogitsError
        if options.temperature == 0.0:
            token = int(best.indices)
        else:
            scores, ids = candidates(logits, options)
            bounds = scores.softmax(dim=0).cumsum(dim=0, dtype=torch.float64)
            drawn = torch.searchsorted(bounds, self._uniform() * bounds[-1:], right=True)
            token = int(ids[drawn.clamp_max(len(ids) - 1)])
        if self._seen is not None:
            self._seen.add(token)
        return token

    def _penalize(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._seen:
            return logits
        ids = torch.tensor(sorted(self._seen), device=logits.device)
        seen = logits[ids]
        penalty = self._options.repetition_penalty
        return logits.index_copy(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    def _uniform(self) -> float:
        """A number in [0, 1), drawn on the CPU so that a seed means the same on every device."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def candidates(logits: torch.Tensor, options: SamplingOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be chosen: their scores, whose softmax is their probabilities, and their ids.

    In the order of Hugging Face's ``generate``: temperature, top-k, top-p, min-p, each on what the one before left.
    """
    scores = logits / options.temperature
    ids = torch.arange(len(scores), device=scores.device)
    if options.top_k:
        scores, ids = scores.topk(min(options.top_k, len(scores)))
    if options.top_p < 1.0:
        scores, ids = _nucleus(scores, ids, options.top_p)
    if options.min_p > 0.0:
        keep = scores >= scores.max() + math.log(options.min_p)
        scores, ids = scores[keep], ids[keep]
    return scores, ids


def _nucleus(scores: torch.Tensor, ids: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest most probable tokens that together reach ``top_p`` (Holtzman et al. 2020), best first."""
    probabilities = scores.softmax(dim=0)
    # Sorting a whole vocabulary takes longer than a small model's layers; a few hundred tokens mostly suffice.
    for count in (min(_FIRST_LOOK, len(scores)), len(scores)):
        ranked, order = probabilities.topk(count)
        reached = ranked.cumsum(dim=0)
        if count == len(scores) or float(reached[-1]) >= top_p:
            break
    kept = order[: int((reached - ranked < top_p).sum().clamp_min(1))]
    return scores[kept], ids[kept]
