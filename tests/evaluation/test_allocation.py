"""Choices of bits against trying all of them, and against a bound where there are too many to try."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from lbq.evaluation.allocation import Candidate, Choice, frontier, least_possible

Units = list[tuple[Candidate, ...]]


def units(seed: int, count: int, coarse: bool = False) -> Units:
    """Units whose divergence mostly falls with the size; ``coarse`` ones have many equal sizes, as layers have."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        sizes = rng.integers(1, 4, 3) * 64 if coarse else rng.integers(1, 10_000, 3)
        kls = rng.lognormal(0, 2, 3) / (sizes if rng.random() < 0.8 else 1)
        made.append(tuple(Candidate(b, int(n), float(kl)) for b, n, kl in zip((3, 4, 8), sizes, kls, strict=True)))
    return made


def every_choice(of: Units) -> list[Choice]:
    return [
        Choice(tuple(c.bits for c in chosen), sum(c.nbytes for c in chosen), sum(c.kl for c in chosen))
        for chosen in product(*of)
    ]


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_against_every_choice(seed: int, coarse: bool) -> None:
    of = units(seed, 7, coarse)
    tried = every_choice(of)
    found = frontier(of)
    assert found.nbytes[0] == min(c.nbytes for c in tried)
    for nbytes in range(int(found.nbytes[0]), int(found.nbytes[-1]) + 1000, 97):
        best = found.best(nbytes)
        assert best.nbytes <= nbytes
        assert best.kl == pytest.approx(min(c.kl for c in tried if c.nbytes <= nbytes))
        assert any(c.bits == best.bits and c.nbytes == best.nbytes and c.kl == pytest.approx(best.kl) for c in tried)


def test_no_point_beats_another() -> None:
    found = frontier(units(9, 20))
    assert len(found) > 100
    assert (np.diff(found.nbytes) > 0).all()
    assert (np.diff(found.kl) < 0).all()


@pytest.mark.parametrize("states", [8, 64, 1 << 15])
def test_thinned_lists_keep_the_promise(states: int) -> None:
    """No worse than the best at a size smaller by units / states of the range; and never better than the bound."""
    of = units(3, 30)
    exact, found = frontier(of, 1 << 30), frontier(of, states)
    assert len(found) <= states
    assert found.nbytes[0] == exact.nbytes[0]
    most = sum(max(c.nbytes for c in unit) for unit in of)
    slack = int(len(of) / (states - 1) * (most - exact.nbytes[0])) + len(of)
    for nbytes in np.linspace(exact.nbytes[0], most, 50).astype(int).tolist():
        best = found.best(nbytes)
        assert least_possible(of, nbytes) <= exact.best(nbytes).kl + 1e-12
        assert best.kl >= exact.best(nbytes).kl - 1e-12
        assert best.kl <= exact.best(max(nbytes - slack, int(exact.nbytes[0]))).kl + 1e-12


def test_bound_is_met_at_the_corners_of_the_hull() -> None:
    of: Units = [
        (Candidate(3, 30, 8.0), Candidate(4, 40, 2.0), Candidate(8, 80, 0.5)),
        (Candidate(3, 30, 5.0), Candidate(4, 40, 4.9), Candidate(8, 80, 1.0)),  # 4 bits lie above the line from 3 to 8
    ]
    assert least_possible(of, 60) == 13
    assert least_possible(of, 70) == 7
    assert least_possible(of, 120) == 3
    assert least_possible(of, 1000) == 1.5
    assert least_possible(of, 95) == pytest.approx(7 - 4 * 25 / 50)
    assert frontier(of).best(95).bits == (4, 4)


def test_one_candidate_is_taken_as_it_is() -> None:
    found = frontier([(Candidate(8, 10, 0.1),), (Candidate(3, 3, 1.0), Candidate(4, 4, 0.5))])
    assert found.point(0) == Choice((8, 3), 13, 1.1)
    assert found.best(14).bits == (8, 4)
