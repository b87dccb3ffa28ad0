"""Scores of two models at the positions of a text, kept as one number a position, and what they sum up to.

Logits come in blocks and are gone after ``add``; five float64 a position stay, or the divergence alone. They stay in
one array from the start: small tensors among large ones that come and go would keep the heap from being used again,
and evaluations with many students would grow by gigabytes.
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
ELEMENTS = 1 << 18  # logits at a time where float32 is enough: temporaries that stay in a CPU's caches
GPU_ELEMENTS = 1 << 25
STEEPEST = 60.0  # the largest log-ratio of probabilities that is trusted to float32
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
    """Collects positions, window by window; every window has the same number of them. All arithmetic is float64."""

    def __init__(self, positions: int) -> None:
        """``positions``: how many there will be, all windows together."""
        self._found = np.empty((5, positions))
        self._count = 0

    def add(self, reference: torch.Tensor, artifact: torch.Tensor, following: torch.Tensor) -> None:
        """Logits of both, [T, V] on one device, and the token that follows each position, int64 [T]."""
        rows = (reference.split(ROWS), artifact.split(ROWS), following.split(ROWS))
        with torch.inference_mode():
            for a, b, c in zip(*rows, strict=True):
                stop = self._count + len(c)
                self._found[:, self._count : stop] = score(a.double(), b.double(), c).numpy(force=True)
                self._count = stop

    def positions(self) -> Positions:
        """Everything, once it has been added, in order."""
        assert self._count == self._found.shape[1]
        return Positions(*self._found)


class KlScorer:
    """Collects KL divergences alone, a fifth of the work of :class:`Scorer`."""

    def __init__(self, positions: int) -> None:
        """As for :class:`Scorer`."""
        self._found = np.empty(positions)
        self._count = 0

    def add(self, reference: torch.Tensor, artifact: torch.Tensor, following: torch.Tensor) -> None:
        """As :meth:`Scorer.add`."""
        del following
        rows = max(1, (GPU_ELEMENTS if reference.is_cuda else ELEMENTS) // reference.shape[1])
        with torch.inference_mode():
            for a, b in zip(reference.split(rows), artifact.split(rows), strict=True):
                stop = self._count + len(a)
                self._found[self._count : stop] = divergence(a, b).numpy(force=True)
                self._count = stop

    def kl(self) -> NDArray[np.float64]:
        """KL(reference ‖ artifact) at every position, once all have been added, nats, float64 [positions]."""
        assert self._count == len(self._found)
        return self._found


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


def divergence(reference: torch.Tensor, artifact: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ artifact) of float32 logits [T, V], float32 [T]: to 1e-5 of itself, down to 1e-8 nats.

    With d the difference of the logits less its mean under p, KL = ln Σ p e^d = ln(1 + Σ p (e^d − 1 − d)): a sum of
    terms that are all ≥ 0, so nothing cancels as it does in Σ p ln(p/q).
    """
    p = reference.softmax(-1)
    d = artifact - reference
    d -= torch.linalg.vecdot(p, d).unsqueeze(1)
    steep = ~(d.amax(-1) <= STEEPEST)  # where p may have vanished and q not
    kl: torch.Tensor = torch.linalg.vecdot(p, torch.expm1(d).sub_(d)).clamp_min_(0).log1p_()
    if bool(steep.any()):
        a, b = (rows[steep].double().log_softmax(-1) for rows in (reference, artifact))
        kl[steep] = (a.exp() * (a - b)).sum(-1).float()
    return kl


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
