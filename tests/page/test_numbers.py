"""Numbers and axes of the page: digits, ticks, and what they do at the edges."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbq.formats.quality import Estimate
from lbq.page.axes import layers, linear, logarithmic
from lbq.page.numbers import number, percent, perplexity, tick, with_error


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.38287, "0.383"),
        (29.5421, "29.5"),
        (1204.4, "1204"),
        (0.00012, "0.000120"),
        (3.2e-7, "3.20·10⁻⁷"),
        (-0.5, "−0.500"),
        (1.5e9, "1.50·10⁹"),
        (0.0, "0"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("mean", "error", "shown"),
    [
        (0.38287, 0.0186, ("0.383", "0.019")),
        (0.26634, 0.0091, ("0.266", "0.009")),
        (-0.24915, 0.0245, ("−0.249", "0.025")),
        (123.4, 17.0, ("123", "17")),
        (0.5, None, ("0.500", None)),
        (0.5, 0.0, ("0.500", None)),
        (0.5, 3e-9, ("0.500", "3.0·10⁻⁹")),
    ],
)
def test_with_error(mean: float, error: float | None, shown: tuple[str, str | None]) -> None:
    assert with_error(Estimate(mean, error)) == shown


def test_other_numbers() -> None:
    assert (percent(0.0926), percent(1.0), perplexity(29.5421), perplexity(None)) == (
        "9.26%",
        "100%",
        "29.54",
        "over 10³⁰⁸",
    )
    assert [tick(value) for value in (0.002, 5.0, 1e-5, 1.25e-6, -1.5, 0.0)] == [
        "0.002",
        "5",
        "10⁻⁵",
        "1.25·10⁻⁶",
        "−1.5",
        "0",
    ]


NUMBERS = st.floats(-1e100, 1e100)


@settings(deadline=None)
@given(NUMBERS, NUMBERS)
def test_linear_axes(one: float, other: float) -> None:
    low, high = sorted((one, other))
    axis = linear(low, high)
    rounding = 1e-8 * (axis.high - axis.low)
    assert axis.low - rounding <= low <= high <= axis.high + rounding
    assert 2 <= len(axis.values) <= 9
    assert len({text for _, text in axis.ticks}) == len(axis.values)
    assert [share for share, _ in axis.ticks] == sorted(share for share, _ in axis.ticks)
    for value in (low, high, *axis.values):
        assert 0 <= axis.at(value) <= 1


@settings(deadline=None)
@given(st.floats(1e-12, 1e100), st.floats(1e-12, 1e100))
def test_logarithmic_axes(one: float, other: float) -> None:
    low, high = sorted((one, other))
    axis = logarithmic(low, high)
    assert axis.at(high) >= axis.at(low) >= 0
    assert axis.low < axis.high <= high * 5.01
    assert axis.high / axis.low < 1e7
    assert 1 <= len(axis.values) <= 7
    assert len({text for _, text in axis.ticks}) == len(axis.values)
    for value in axis.values:
        assert 0 <= axis.at(value) <= 1


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 30, 80, 81, 126, 4096])
def test_layers(count: int) -> None:
    axis = layers(count)
    assert 1 <= len(axis.values) <= 8
    assert axis.values[0] == 0
    assert axis.values[-1] <= count - 1
    assert axis.at(0) == pytest.approx(0.5 / count)
    assert axis.at(count - 1) == pytest.approx(1 - 0.5 / count)
