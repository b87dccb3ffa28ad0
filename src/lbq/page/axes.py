"""Axes: where a value lies between 0 and 1, and the round numbers that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbq.page.numbers import exponent, tick

_NARROWEST = 1e-7  # of the values on an axis: below, its ticks could not be told apart
_DECADES = 5  # the most that a logarithmic axis shows: what lies below is drawn at its end


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, with a tick at each of ``values``."""

    low: float
    high: float
    values: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Share of the axis' length, 0 to 1; what lies beyond an end is put there."""
        if value <= self.low:
            return 0.0
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return min(1.0, ((math.log(value) if self.log else value) - low) / (high - low))

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """(share, label)"""
        return tuple((self.at(value), tick(value)) for value in self.values)


def linear(low: float, high: float, most: int = 6) -> Axis:
    """An axis that holds ``low`` to ``high`` and ends on ticks, of which there are about ``most``."""
    if high - low < _NARROWEST * max(abs(low), abs(high)) or high == low:
        margin = abs(high) / 1000 or 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, 1 - exponent(step))
    return Axis(first * step, last * step, tuple(round(i * step, decimals) for i in range(first, last + 1)))


def logarithmic(low: float, high: float) -> Axis:
    """An axis that holds ``low`` to ``high``, both positive, or the last five decades of them."""
    low = max(low, high / 10**_DECADES)
    powers = range(exponent(low) - 1, exponent(high) + 2)
    steps = [float(f"{m}e{p}") for p in powers for m in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= low)
    last = min(i for i, step in enumerate(steps) if step >= high and i > first)
    shown = steps[first : last + 1]
    if len(shown) > 7:
        shown = [step for step in shown if f"{step:e}".startswith("1")]
    return Axis(steps[first], steps[last], tuple(shown), log=True)


def layers(count: int, most: int = 8) -> Axis:
    """Layers 0 to ``count`` − 1, each as wide as the others: layer i is centred at (i + ½)/count."""
    step = next(s for s in (m * 10**p for p in range(9) for m in (1, 2, 5)) if (count - 1) // s < most)
    return Axis(-0.5, count - 0.5, tuple(float(i) for i in range(0, count, step)))


def _round_step(step: float) -> float:
    """The least of 1, 2, 5, 10, … times a power of ten that is not below ``step``."""
    power = 10.0 ** exponent(step)
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))
