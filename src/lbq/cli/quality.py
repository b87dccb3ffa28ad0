"""How commands print measured quality."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lbq.formats.quality import Divergence, Estimate, Scores, Text


def score_rows(scores: Scores) -> list[tuple[str, str]]:
    """Lines of a table of (measure, value)."""
    kl = scores.kl
    return [
        ("KL divergence, nats", with_error(kl, "{:.5f}")),
        ("  50%, 90%, 99%, max", f"{kl.p50:.5f}, {kl.p90:.5f}, {kl.p99:.5f}, {kl.max:.5f}"),
        ("same top-1 token", with_error(scores.same_top1, "{:.2%}")),
        ("perplexity", perplexities(scores)),
        ("  ln(ratio)", with_error(scores.perplexity.log_ratio, "{:+.5f}")),
        ("logit cosine", f"{scores.logit_cosine.mean:.6f}, least {scores.logit_cosine.least:.6f}"),
    ]


def text_line(text: Text) -> str:
    """What was read, and what ± means."""
    errors = "± is the standard error over windows" if text.windows > 1 else "one window gives no standard errors"
    return f"{text.positions} positions in {text.windows} windows of {text.context} tokens of {text.path}; {errors}"


def with_error(value: Estimate | Divergence, form: str) -> str:
    """``0.12345 ± 0.00678``"""
    mean = form.format(value.mean)
    return mean if value.standard_error is None else f"{mean} ± {form.format(value.standard_error).removeprefix('+')}"


def perplexities(scores: Scores) -> str:
    """``29.542, reference 23.027``"""
    one, other = (
        "past 1e308" if value is None else f"{value:.3f}"
        for value in (scores.perplexity.artifact, scores.perplexity.reference)
    )
    return f"{one}, reference {other}"
