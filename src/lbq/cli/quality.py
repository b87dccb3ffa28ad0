"""How commands print measured quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lbq.formats.comparison import WHOLE, Share

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


def positions_line(text: Text) -> str:
    """What was read."""
    return f"{text.positions} positions in {text.windows} windows of {text.context} tokens of {text.path}"


def text_line(text: Text) -> str:
    """What was read, and what ± means."""
    errors = "± is the standard error over windows" if text.windows > 1 else "one window gives no standard errors"
    return f"{positions_line(text)}; {errors}"


def with_error(value: Estimate | Divergence, form: str) -> str:
    """``0.12345 ± 0.00678``"""
    mean = form.format(value.mean)
    return mean if value.standard_error is None else f"{mean} ± {form.format(value.standard_error).removeprefix('+')}"


def perplexities(scores: Scores) -> str:
    """``29.542, reference 23.027``"""
    return f"{perplexity(scores.perplexity.artifact)}, reference {perplexity(scores.perplexity.reference)}"


def perplexity(value: float | None) -> str:
    """``29.542``"""
    return "past 1e308" if value is None else f"{value:.3f}"


def stored_as(shares: Sequence[Share]) -> str:
    """``INT4 g64 79%, INT8 row 21%``: how linear layers are stored, by share of weights."""
    total = sum(share.weights for share in shares)
    shown = [f"{_scheme(share)} {share.weights / total:.0%}" for share in shares[:3]]
    return ", ".join(shown) + (f" and {len(shares) - 3} more" if shares[3:] else "")


def _scheme(share: Share) -> str:
    if share.bits == WHOLE:
        return "16 bits"
    return f"INT{share.bits} " + ("row" if share.group is None else f"g{share.group}")
