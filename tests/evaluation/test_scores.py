"""Scores of single positions and what they sum up to, against formulas written another way."""

from __future__ import annotations

import math
import statistics

import msgspec
import numpy as np
import pytest
import torch

from lbq.evaluation.scores import ROWS, KlScorer, Positions, Scorer, divergence, estimate, summarize
from lbq.formats.quality import Scores

pytestmark = pytest.mark.usefixtures("one_thread")

T, V = 2 * ROWS + 6, 31


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    reference = torch.randn(T, V, generator=random) * 4
    artifact = reference + torch.randn(T, V, generator=random)
    return reference, artifact, torch.randint(0, V, (T,), generator=random)


def found(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Positions:
    scorer = Scorer(len(logits[2]))
    scorer.add(*logits)
    return scorer.positions()


def test_every_position(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    a, b = (rows.double().numpy() for rows in logits[:2])
    following = logits[2].tolist()
    got = found(logits)
    assert all(values.shape == (T,) and values.dtype == np.float64 for values in vars(got).values())
    for i in range(T):
        p, q = np.exp(a[i]) / np.exp(a[i]).sum(), np.exp(b[i]) / np.exp(b[i]).sum()
        assert got.kl[i] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-10)
        assert got.same_top1[i] == (a[i].argmax() == b[i].argmax())
        assert got.cosine[i] == pytest.approx(a[i] @ b[i] / np.sqrt((a[i] @ a[i]) * (b[i] @ b[i])), rel=1e-12)
        assert got.reference_nll[i] == pytest.approx(-math.log(p[following[i]]), rel=1e-10)
        assert got.artifact_nll[i] == pytest.approx(-math.log(q[following[i]]), rel=1e-10)
    assert 0 < got.same_top1.sum() < T


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 10.0, 100.0, 1e4])
def test_divergences_in_float32(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in float64, small or large; 1e4 makes probabilities vanish in float32."""
    random = torch.Generator().manual_seed(4)
    reference = torch.randn(T, 1000, generator=random) * max(4, scale)
    artifact = reference + torch.randn(T, 1000, generator=random) * scale + 3
    p, q = (rows.double().log_softmax(-1) for rows in (reference, artifact))
    expected = (p.exp() * (p - q)).sum(-1)
    monkeypatch.setattr("lbq.evaluation.scores.ELEMENTS", 7000)
    scorer = KlScorer(T)
    half = T // 2
    for part in (slice(half), slice(half, T)):
        scorer.add(reference[part], artifact[part], torch.zeros(0))
    np.testing.assert_allclose(scorer.kl(), expected, rtol=1e-3, atol=1e-12)
    assert scorer.kl().mean() == pytest.approx(float(expected.mean()), rel=1e-5)


def test_a_divergence_that_float32_would_miss() -> None:
    """All of q lies where p is 0 in float32."""
    reference, artifact = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, 200.0]])
    assert float(divergence(reference, artifact)) == pytest.approx(200)
    assert float(divergence(reference, reference + 7)) == 0


def test_equal_logits_cost_nothing(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, _, following = logits
    scores = summarize(found((reference, reference + 5, following)), 2)  # a constant changes no distribution
    assert 0 <= scores.kl.max < 1e-12
    assert scores.same_top1.mean == 1
    assert scores.logit_cosine.least < 1
    exact = summarize(found((reference, reference, following)), 2)
    assert (exact.kl.max, exact.kl.standard_error, exact.perplexity.log_ratio.mean) == (0, 0, 0)
    assert exact.logit_cosine.least == pytest.approx(1, abs=1e-15)


def test_far_logits_stay_finite() -> None:
    reference, artifact = torch.tensor([[3e4, 0.0, -3e4]]), torch.tensor([[-3e4, 0.0, 3e4]])
    scores = summarize(found((reference, artifact, torch.tensor([0]))), 1)
    assert scores.kl.mean == pytest.approx(6e4)
    assert scores.perplexity.reference == 1
    assert scores.perplexity.artifact is None  # e^60000: no float has it
    assert msgspec.json.decode(msgspec.json.encode(scores), type=Scores) == scores


def test_summary(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    positions = found(logits)
    scores = summarize(positions, 2)
    ranked = sorted(positions.kl)
    for share, got in ((0.5, scores.kl.p50), (0.9, scores.kl.p90), (0.99, scores.kl.p99)):
        at = share * (T - 1)
        low = int(at)
        assert got == pytest.approx(ranked[low] + (at - low) * (ranked[low + 1] - ranked[low]))
    assert scores.kl.max == ranked[-1]
    assert scores.kl.mean == pytest.approx(statistics.fmean(ranked))
    assert scores.logit_cosine.least == positions.cosine.min()
    mean = statistics.fmean(positions.artifact_nll) - statistics.fmean(positions.reference_nll)
    assert scores.perplexity.log_ratio.mean == pytest.approx(mean)
    assert scores.perplexity.artifact is not None
    assert scores.perplexity.reference is not None
    assert scores.perplexity.artifact / scores.perplexity.reference == pytest.approx(math.exp(mean))


def test_standard_errors_are_over_windows() -> None:
    windows = [[1.0, 2.0, 3.0], [2.0, 2.0, 5.0], [0.0, 1.0, 1.0], [4.0, 4.0, 4.0]]
    got = estimate(np.array(windows).ravel(), 4)
    means = [statistics.fmean(window) for window in windows]
    assert got.mean == statistics.fmean(means)
    assert got.standard_error == pytest.approx(statistics.stdev(means) / 2)
    assert estimate(np.array(windows).ravel(), 1).standard_error is None


def test_standard_error_is_the_spread_of_means() -> None:
    """Positions alike within their window: the error must be that of as few texts, not of as many positions."""
    random = np.random.default_rng(4)
    texts = random.normal(size=(2000, 16, 1)).repeat(25, axis=2)  # 2000 runs of 16 windows of 25 positions
    estimates = [estimate(run.ravel(), 16) for run in texts]
    spread = statistics.stdev(e.mean for e in estimates)
    errors = [e.standard_error for e in estimates if e.standard_error is not None]
    assert statistics.fmean(error**2 for error in errors) == pytest.approx(spread**2, rel=0.1)
