"""Scores of two models at the positions of a text, kept as one number a position, and what they sum up to.

Logits come in blocks and are gone after :meth:`Scorer.add`; five float64 a position stay. All arithmetic is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lbq.formats.quality import Divergence, Estimate, LogitCosine, Perplexity, Scores

ROWS = 32  # positions at a time: bounds the float64 temporaries, [ROWS, V] each
_LARGEST = math.log(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Positions:
    """What was found at each position, float64 [positions]."""

    kl: NDArray[np.float64]  # KL(reference ‖ artifact), nats
    same_top1: NDArray[np.float64]  # 1 or 0
    cosine: NDArray[np.float64]
    artifact_nll: NDArray[np.float64]  # −ln of the probability of the token that follows
    reference_nll: NDArray[np.float64]


class Scorer:
    """Collects positions, window by window; every window has the same number of them."""

    def __init__(self) -> None:
        self._found: list[torch.Tensor] = []  # each [5, rows]

    def add(self, reference: torch.Tensor, artifact: torch.Tensor, following: torch.Tensor) -> None:
        """Logits of both, [T, V] on one device, and the token that follows each position, int64 [T]."""
        rows = (reference.split(ROWS), artifact.split(ROWS), following.split(ROWS))
        with torch.inference_mode():
            self._found.extend(score(a.double(), b.double(), c).cpu() for a, b, c in zip(*rows, strict=True))

    def positions(self) -> Positions:
        """Everything that was added, in order."""
        return Positions(*torch.cat(self._found, dim=1).numpy())


def score(reference: torch.Tensor, artifact: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """The fields of :class:`Positions`, float64 [5, T], of logits float64 [T, V] and the tokens that follow, [T]."""
    p, q = reference.log_softmax(-1), artifact.log_softmax(-1)
    following = following[:, None]
    return torch.stack(
        [
            (p.exp() * (p - q)).sum(-1).clamp_min(0),  # below 0 by rounding alone
            (reference.argmax(-1) == artifact.argmax(-1)).double(),
            functional.cosine_similarity(reference, artifact, dim=-1),
            -q.gather(1, following)[:, 0],
            -p.gather(1, following)[:, 0],
        ]
    )


def summarize(found: Positions, windows: int) -> Scores:
    """Means, percentiles (linear between ranks) and standard errors over ``windows`` windows of equal length."""
    p50, p90, p99 = (float(value) for value in np.percentile(found.kl, (50, 90, 99)))
    kl = estimate(found.kl, windows)
    return Scores(
        kl=Divergence(kl.mean, kl.standard_error, p50, p90, p99, float(found.kl.max())),
        same_top1=estimate(found.same_top1, windows),
        logit_cosine=LogitCosine(float(found.cosine.mean()), float(found.cosine.min())),
        perplexity=Perplexity(
            artifact=_exp(float(found.artifact_nll.mean())),
            reference=_exp(float(found.reference_nll.mean())),
            log_ratio=estimate(found.artifact_nll - found.reference_nll, windows),
        ),
    )


def estimate(values: NDArray[np.float64], windows: int) -> Estimate:
    """Mean and its standard error, float64 [positions] in order.

    Positions of one window share a text and are not independent; windows nearly are. So the error is that of a mean of
    window means: their standard deviation (n − 1) over √windows.
    """
    means = values.reshape(windows, -1).mean(axis=1)
    error = None if windows == 1 else float(means.std(ddof=1)) / math.sqrt(windows)
    return Estimate(float(values.mean()), error)


def _exp(value: float) -> float | None:
    return math.exp(value) if value < _LARGEST else None  # infinity is not JSON
