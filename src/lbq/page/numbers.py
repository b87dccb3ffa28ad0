"""Numbers as a reader wants them: as many digits as they are known to, no powers of ten where none are needed."""

from __future__ import annotations

import math

from lbq.formats.quality import Divergence, Estimate

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LEAST, _MOST = 1e-4, 1e7  # outside of these a number is written with a power of ten
_MOST_DECIMALS = 6


def exponent(value: float) -> int:
    """The power of ten of the first digit of ``value``, which is not 0."""
    return math.floor(math.log10(abs(value)))


def number(value: float, digits: int = 3) -> str:
    """``0.383``, ``29.5``, ``1204``, ``3.20·10⁻⁷``, with ``digits`` significant ones."""
    if value == 0:
        return "0"
    if not _LEAST <= abs(value) < _MOST:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{_signed(mantissa)}·10{str(int(power)).translate(_SUPERSCRIPTS)}"
    return _signed(f"{value:.{max(0, digits - 1 - exponent(value))}f}")


def tick(value: float) -> str:
    """``0.02``, ``5``, ``10⁻⁶``: a round number of an axis, no digit more than it has."""
    if value == 0 or abs(value) >= _LEAST:
        return _signed(f"{value:.9f}".rstrip("0").rstrip("."))
    mantissa, _, power = f"{value:e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    ten = f"10{str(int(power)).translate(_SUPERSCRIPTS)}"
    return ten if mantissa == "1" else f"{_signed(mantissa)}·{ten}"


def with_error(value: Estimate | Divergence) -> tuple[str, str | None]:
    """Mean and standard error, to the error's second digit, or its first from 5 on: ``0.383``, ``0.019``."""
    error = value.standard_error
    if not error:  # unknown, or exactly 0
        return number(value.mean), None
    if error < 10.0**-_MOST_DECIMALS:
        return number(value.mean), number(error, 2)
    digits = 1 if abs(error) >= 5 * 10.0 ** exponent(error) else 2
    decimals = max(0, digits - 1 - exponent(error))
    return _signed(f"{value.mean:.{decimals}f}"), f"{error:.{decimals}f}"


def percent(value: float, digits: int = 3) -> str:
    """``9.26%`` of 0.0926."""
    return f"{number(100 * value, digits)}%"


def cosine(value: float) -> str:
    """``0.99572``"""
    return _signed(f"{value:.5f}")


def perplexity(value: float | None) -> str:
    """``29.54``; None is past any float."""
    if value is None:
        return "over 10³⁰⁸"
    return number(value, 4)


def _signed(text: str) -> str:
    """With a minus sign that is as wide as a plus."""
    return text.replace("-", "−")
