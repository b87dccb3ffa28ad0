"""What ``lbq eval`` finds; its JSON form is described in ``docs/quality.md``."""

from __future__ import annotations

import msgspec

VERSION = 1


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all parts: immutable, and strict about fields it does not know."""


class Estimate(_Part, frozen=True):
    """A mean over positions and its standard error; None where a single window gives no error."""

    mean: float
    standard_error: float | None


class Divergence(_Part, frozen=True):
    """KL(reference ‖ artifact) of the next-token distributions, in nats, over positions."""

    mean: float
    standard_error: float | None
    p50: float
    p90: float
    p99: float
    max: float


class LogitCosine(_Part, frozen=True):
    """Cosine of the two vectors of logits, over positions."""

    mean: float
    least: float


class Perplexity(_Part, frozen=True):
    """exp of the mean negative log-probability of the text's tokens; ``log_ratio`` is ln(artifact / reference)."""

    artifact: float
    reference: float
    log_ratio: Estimate


class Scores(_Part, frozen=True):
    """All that is measured at positions."""

    kl: Divergence
    same_top1: Estimate
    logit_cosine: LogitCosine
    perplexity: Perplexity


class Text(_Part, frozen=True):
    """What was read: ``tokens`` of it in ``windows`` of ``context``; ``positions`` of these are predicted."""

    path: str
    sha256: str
    tokens: int
    context: int
    windows: int
    positions: int


class Weights(_Part, frozen=True):
    """From the artifact's manifest: bits a quantised weight, and the weights' cosine to their source."""

    bits_per_weight: float
    cosine: float


class Evaluation(_Part, frozen=True):
    """An artifact against a reference on a text."""

    eval_format: int
    artifact: str
    reference: str
    device: str
    text: Text
    weights: Weights
    scores: Scores
    notes: tuple[str, ...]
