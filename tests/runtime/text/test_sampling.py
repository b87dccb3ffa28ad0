"""The distribution is Hugging Face's, and a seed decides everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbq.formats.errors import DataError, UsageError
from lbq.runtime.text.sampling import Sampler, SamplingOptions, candidates

V = 1500  # more than the first look of top-p


def distribution(logits: torch.Tensor, options: SamplingOptions, prompt: list[int]) -> torch.Tensor:
    """Probabilities [V] of the next token."""
    scores, ids = candidates(Sampler(options, prompt)._penalize(logits), options)
    return torch.zeros(len(logits)).index_put((ids,), scores.softmax(dim=0))


def hugging_face(logits: torch.Tensor, options: SamplingOptions, prompt: list[int]) -> torch.Tensor:
    from transformers.generation import logits_process as hf

    chain: list[Any] = []
    if options.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    chain.append(hf.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        chain.append(hf.TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        chain.append(hf.TopPLogitsWarper(options.top_p))
    if options.min_p > 0.0:
        chain.append(hf.MinPLogitsWarper(options.min_p))
    scores, ids = logits[None].clone(), torch.tensor([prompt])
    for step in chain:
        scores = step(ids, scores)
    return scores[0].softmax(dim=0)


@given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.5, 3.0, 12.0]),
    options=st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 40, 9999]),
        top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.1, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    ),
)
@settings(deadline=None, max_examples=150)
def test_the_distribution_is_hugging_faces(seed: int, spread: float, options: SamplingOptions) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=generator) * spread
    prompt = torch.randint(V, (200,), generator=generator).tolist()
    ours, theirs = distribution(logits, options, prompt), hugging_face(logits, options, prompt)
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7):
        # A token on the border of top-p may fall either way: the sums are rounded in another order.
        different = int(((ours > 0) != (theirs > 0)).sum())
        assert different <= 1
        assert options.top_p < 1.0
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=2e-3)


def test_the_distribution_is_what_is_drawn() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -torch.inf, 1.5])
    options = SamplingOptions(temperature=0.8, seed=3)
    sampler = Sampler(options, [])
    drawn = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(20_000)]), minlength=5) / 20_000
    want = (logits / 0.8).softmax(dim=0)
    assert drawn[3] == 0
    assert (drawn - want).abs().max() < 0.015  # four standard deviations


def test_a_token_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    sampler = Sampler(SamplingOptions(temperature=1.0), [])
    for uniform, token in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        monkeypatch.setattr(sampler, "_uniform", lambda uniform=uniform: uniform)
        assert sampler.choose(logits) == token


def test_a_seed_decides() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    kept = logits.clone()

    def text(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.5, repetition_penalty=1.1, seed=seed), [1, 2])
        return [sampler.choose(logits) for _ in range(40)]

    assert text(7) == text(7)
    assert text(7) != text(8)
    assert text(None) != text(None)
    assert torch.equal(logits, kept)


def test_greedy_takes_the_first_largest_and_the_penalty_counts_what_was_chosen() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -1.0])
    assert Sampler(SamplingOptions(top_k=1, seed=1), []).choose(logits) == 1
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), [])
    assert [sampler.choose(logits) for _ in range(3)] == [1, 2, 1]
    assert Sampler(SamplingOptions(repetition_penalty=2.0), [1]).choose(logits) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=1.0, seed=1),
        SamplingOptions(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2, seed=1),
        SamplingOptions(temperature=1.0, top_p=0.5, seed=1),
        SamplingOptions(temperature=1.0, min_p=0.5, seed=1),
    ],
)
def test_logits_that_are_no_numbers(value: float, options: SamplingOptions) -> None:
    logits = torch.zeros(10)
    logits[4] = value
    with pytest.raises(DataError, match=r"lbq verify.*--dtype float32"):
        Sampler(options, [2]).choose(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, float("nan")) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        *((name, -0.1) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", "1"),
        ("temperature", "1"),
        ("temperature", None),
        ("top_p", "0.9"),
        ("top_k", None),
        ("seed", 1 << 63),
    ],
)
def test_options_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is "):
        SamplingOptions(**{name: value})
