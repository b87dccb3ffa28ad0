"""What quantisation cost: measured quality, as reports hold it and ``lbq eval`` prints it (``docs/quality.md``)."""

from __future__ import annotations

from lbq.formats.spec import Bounded, Name, Part

EVALUATION_VERSION = 1


class Estimate(Part, frozen=True):
    """A mean over positions and its standard error; None where a single window gives no error."""

    mean: Bounded
    standard_error: Bounded | None


class Divergence(Part, frozen=True):
    """KL(reference ‖ artifact) of the next-token distributions, in nats, over positions."""

    mean: Bounded
    standard_error: Bounded | None
    p50: Bounded
    p90: Bounded
    p99: Bounded
    max: Bounded


class LogitCosine(Part, frozen=True):
    """Cosine of the two vectors of logits, over positions."""

    mean: Bounded
    least: Bounded


class Perplexity(Part, frozen=True):
    """exp of the mean negative log-probability of the text's tokens; ``log_ratio`` is ln(artifact / reference).

    A perplexity past the largest float is None.
    """

    artifact: float | None
    reference: float | None
    log_ratio: Estimate


class Scores(Part, frozen=True):
    """All that is measured at positions."""

    kl: Divergence
    same_top1: Estimate
    logit_cosine: LogitCosine
    perplexity: Perplexity


class Text(Part, frozen=True):
    """What was read: ``tokens`` of it in ``windows`` of ``context``; ``positions`` of these are predicted."""

    path: str
    sha256: str
    tokens: int
    context: int
    windows: int
    positions: int


class Weights(Part, frozen=True):
    """From the artifact's manifest: bits a quantised weight, and the weights' cosine to their source."""

    bits_per_weight: Bounded
    cosine: Bounded


class Evaluation(Part, frozen=True):
    """An artifact against a reference on a text."""

    eval_format: int
    artifact: str
    reference: str
    device: str
    text: Text
    weights: Weights
    scores: Scores
    notes: tuple[str, ...]


class Sensitivity(Part, frozen=True):
    """What quantising one fused unit alone, all else as in the original, does to the distributions."""

    modules: tuple[Name, ...]  # of the unit
    bits: int
    group: int | None  # that was searched; None: a scale a row
    nbytes: int  # codes and scales of the unit
    kl: Estimate


class FrontierPoint(Part, frozen=True):
    """A choice of bits for every unit: the least sum of the units' divergences at this size.

    ``bits`` are in the order of the units of ``Quality.sensitivity``. ``predicted_kl`` is the sum of the units' own
    divergences, ``measured_kl`` that of the whole model where it was measured.
    """

    bits_per_weight: Bounded  # codes and scales
    nbytes: int
    bits: tuple[int, ...]
    predicted_kl: Bounded
    measured_kl: Estimate | None = None


class Quality(Part, frozen=True):
    """The measured part of a report: scores of the whole artifact, and what each unit does alone where it was asked."""

    text: Text
    scores: Scores
    device: str
    sensitivity_text: Text | None = None
    sensitivity: tuple[Sensitivity, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
