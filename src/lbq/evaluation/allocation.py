"""Bits for every fused unit: of all choices of a size, the one with the least sum of divergences.

Each unit has a few candidates, and one of each is taken: a multiple-choice knapsack. Units are added one by one to a
list of partial choices that holds those no other beats in both size and divergence (Nemhauser and Ullmann's method),
so one pass gives the whole frontier, exactly, as long as the list stays below ``STATES``. A longer list is thinned: of
``STATES`` equal ranges of size, each keeps its least divergence. What is then found at a size is no worse than the best
at a size that is smaller by units / STATES of the whole range; :func:`least_possible` bounds the loss from below, and
it is far smaller than the error of any measured divergence.

That divergences of units add up is an approximation, and the caller's: the choice that is made is measured as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

STATES = 1 << 15


@dataclass(frozen=True)
class Candidate:
    """One way to store a unit: bytes of codes and scales, and what it does to the divergence, nats."""

    bits: int
    nbytes: int
    kl: float


Unit = Sequence[Candidate]


@dataclass(frozen=True)
class Choice:
    """A candidate for every unit: its bits, in order, and the sums."""

    bits: tuple[int, ...]
    nbytes: int
    kl: float


class Frontier:
    """All choices that no other beats in both size and divergence, by size, as far as :func:`frontier` kept them."""

    def __init__(
        self,
        units: Sequence[Unit],
        nbytes: NDArray[np.int64],
        kl: NDArray[np.float64],
        came_from: Sequence[NDArray[np.int32]],
    ) -> None:
        """``came_from``: for each unit and entry of its list, candidate · (length of the list before) + entry there."""
        self._units, self._came_from = units, came_from
        self.nbytes, self.kl = nbytes, kl  # [points]; sizes rise, divergences fall

    def __len__(self) -> int:
        return len(self.nbytes)

    def point(self, index: int) -> Choice:
        """The choice at a place of the frontier."""
        nbytes, kl = int(self.nbytes[index]), float(self.kl[index])
        bits: list[int] = []
        for at in range(len(self._units) - 1, -1, -1):
            before = len(self._came_from[at - 1]) if at else 1
            candidate, index = divmod(int(self._came_from[at][index]), before)
            bits.append(self._units[at][candidate].bits)
        return Choice(tuple(reversed(bits)), nbytes, kl)

    def best(self, nbytes: int) -> Choice:
        """The least divergence at no more than ``nbytes``, which must be at least the smallest size."""
        assert nbytes >= self.nbytes[0]
        return self.point(int(np.searchsorted(self.nbytes, nbytes, side="right")) - 1)


def frontier(units: Sequence[Unit], states: int = STATES) -> Frontier:
    """The frontier over ``units``, each with at least one candidate; ``states`` bounds its length."""
    nbytes, kl = np.zeros(1, np.int64), np.zeros(1)
    came_from: list[NDArray[np.int32]] = []
    for unit in units:
        sizes = (np.array([c.nbytes for c in unit], np.int64)[:, None] + nbytes).ravel()
        sums = (np.array([c.kl for c in unit])[:, None] + kl).ravel()
        order = np.lexsort((sums, sizes))
        ahead = np.minimum.accumulate(sums[order])
        kept = order[np.append(True, ahead[1:] < ahead[:-1])]
        kept = kept[_thinned(sizes[kept], states)]
        nbytes, kl = sizes[kept], sums[kept]
        came_from.append(kept.astype(np.int32))
    return Frontier(units, nbytes, kl, came_from)


def _thinned(sizes: NDArray[np.int64], states: int) -> NDArray[np.bool_]:
    """Which entries of a rising list stay: the first, and in each of ``states`` ranges the last, the best of it."""
    if len(sizes) <= states:
        return np.ones(len(sizes), np.bool_)
    span = int(sizes[-1] - sizes[0]) + 1
    ranges = ((sizes - sizes[0]) / span * (states - 1)).astype(np.int64)
    stays = np.append(ranges[1:] != ranges[:-1], True)
    stays[0] = True
    return stays


def least_possible(units: Sequence[Unit], nbytes: int) -> float:
    """A bound: no choice of at most ``nbytes`` has a smaller sum of divergences.

    It is the linear relaxation's, in which a unit may lie between two candidates: steps along the units' convex hulls,
    steepest first.
    """
    kl, left = 0.0, float(nbytes)
    steps: list[tuple[float, int]] = []  # (divergence a byte, bytes)
    for unit in units:
        hull = _hull(unit)
        kl, left = kl + hull[0].kl, left - hull[0].nbytes
        for a, b in pairwise(hull):
            steps.append(((b.kl - a.kl) / (b.nbytes - a.nbytes), b.nbytes - a.nbytes))
    for slope, size in sorted(steps):
        taken = min(float(size), left)
        if taken <= 0:
            break
        kl, left = kl + slope * taken, left - taken
    return kl


def _hull(unit: Unit) -> list[Candidate]:
    """The lower convex hull from the smallest candidate on, as far as it falls."""
    hull: list[Candidate] = []
    for c in sorted(unit, key=lambda c: (c.nbytes, c.kl)):
        if hull and c.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def _above(a: Candidate, b: Candidate, c: Candidate) -> bool:
    """Whether ``b`` lies on or above the line from ``a`` to ``c``."""
    return (b.kl - a.kl) * (c.nbytes - a.nbytes) >= (c.kl - a.kl) * (b.nbytes - a.nbytes)
