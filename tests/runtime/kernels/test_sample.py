"""Choosing a token on the device: see test_gemv.py for where this runs."""

from __future__ import annotations

import math

import pytest
import torch

from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.sample import Chain, Choice, choose, reference
from lbq.runtime.text.sampling import SamplingOptions, candidates

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
V, POSITION = 1500 if INTERPRETED else 2500, 7
PLAIN = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0, "seed": 0}
NONE = torch.tensor([], dtype=torch.int64)


def logits_of(seed: int = 1, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(V, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def run(logits: torch.Tensor, seen: torch.Tensor = NONE, **settings: float) -> int:
    """The chosen token; checks that it is handed on."""
    chain = Chain(V, 16, DEVICE)
    chain.start(5, POSITION)
    choice = chain.set(**{**PLAIN, **settings}, seen=seen)
    choose(logits, chain, choice)
    assert int(chain.position) == POSITION + 1
    assert not chain.counter.any()
    token = int(chain.history[0, POSITION + 1])
    assert int(chain.token) == max(token, 0)
    if choice.penalty and token >= 0:
        assert bool(chain.seen[0, token])
    return token


def test_greedy() -> None:
    logits = logits_of()
    assert run(logits) == int(logits.argmax())
    logits[[3, 1400]] = 50.0
    assert run(logits) == 3  # the first of equals


def test_penalty() -> None:
    logits = logits_of()
    order = logits.argsort(descending=True)
    assert run(logits, order[:3].cpu(), penalty=50.0) == int(order[3])
    assert run(logits - 100, order[:3].cpu(), penalty=1.5) == int(order[3])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_told(bad: float, temperature: float) -> None:
    logits = logits_of()
    logits[1200] = bad
    assert run(logits, temperature=temperature) == -1
    assert run(torch.full_like(logits, -math.inf), temperature=temperature) == -1


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.05},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 5.0, "top_k": 1000, "top_p": 0.5},
    {"temperature": 0.01, "top_k": 3},
    {"temperature": 1.0, "top_p": 1e-6},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_drawn_token_is_the_references(settings: dict[str, float]) -> None:
    for seed in (1,) if INTERPRETED else range(1, 40):
        logits = logits_of(seed)
        filters = {**PLAIN, **settings, "seed": (seed << 40) + 12345}
        keep = reference.kept(
            logits.cpu(), filters["temperature"], filters["top_k"], filters["top_p"], filters["min_p"]
        )
        noisy = logits.cpu().double() / filters["temperature"] + reference.noise(filters["seed"], V, POSITION)
        noisy[~keep] = -math.inf
        assert run(logits, **filters) == int(noisy.argmax())


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_reference_keeps_what_the_host_keeps(settings: dict[str, float]) -> None:
    logits = logits_of().cpu()
    options = SamplingOptions(**settings)
    keep = reference.kept(logits, options.temperature, options.top_k, options.top_p, options.min_p)
    assert set(keep.nonzero()[:, 0].tolist()) == set(candidates(logits, options)[1].tolist())


def test_noise_is_gumbels() -> None:
    x = reference.noise(99, 200_000, 3)
    for quantile in (0.01, 0.5, 0.99, 0.9999):
        at = -math.log(-math.log(quantile))
        assert abs(float((x <= at).double().mean()) - quantile) < 5 * math.sqrt(quantile * (1 - quantile) / len(x))
    other = reference.noise(99, 200_000, 4)
    assert abs(float(torch.corrcoef(torch.stack((x, other)))[0, 1])) < 0.01


def test_philox_is_philox() -> None:
    """The first of the known answers of Random123: all-zero key and counter."""
    assert reference.philox(0, torch.tensor([0]), 0).tolist() == [0x6627E8D5]


def test_steps_follow_each_other() -> None:
    chain = Chain(V, 16, DEVICE)
    chain.start(5, 0)
    choice = chain.set(**{**PLAIN, "temperature": 1.0, "penalty": 1e6, "seed": 3}, seen=NONE)
    assert choice == Choice(sampled=True, penalty=True)
    logits = torch.full((V,), -100.0, device=DEVICE)
    logits[:4] = 10.0
    for _ in range(4):
        choose(logits, chain, choice)
    assert sorted(chain.history[0, 1:5].tolist()) == [0, 1, 2, 3]  # each once: the penalty is for those just drawn
    assert int(chain.position) == 4


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "penalty": 1.3}], ids=str)
def test_several_texts_choose_as_each_by_itself(settings: dict[str, float]) -> None:
    logits, positions = torch.stack([logits_of(seed) for seed in (1, 2, 3)]), (7, 0, 15)
    chains = [Chain(V, 16, DEVICE, texts) for texts in (3, 1, 1, 1)]
    for i, position in enumerate(positions):
        for chain in (chains[0].of_text(i), chains[1 + i]):
            chain.start(i, position)
            choice = chain.set(**{**PLAIN, **settings, "seed": 10 + i}, seen=torch.tensor([int(logits[i].argmax())]))
    choose(logits, chains[0], choice)
    for i, position in enumerate(positions):
        alone = chains[1 + i]
        choose(logits[i], alone, choice)
        assert int(chains[0].token[i]) == int(alone.token) == int(alone.history[0, position + 1])
        assert torch.equal(chains[0].history[i], alone.history[0])
        assert torch.equal(chains[0].seen[i], alone.seen[0])
    assert chains[0].position.tolist() == [8, 1, 15]  # it does not leave its slots
    assert not chains[0].counter.any()
