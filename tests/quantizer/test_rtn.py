"""Round to nearest against float64, at every rule; degenerate groups; elements that cannot be quantised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbq.formats.errors import DataError
from lbq.formats.packing import BITS, PackedWeight
from lbq.quantizer.rtn import (
    DEFAULT_RULES,
    LARGEST_WEIGHT,
    SEARCH_POWERS,
    SHRINK,
    SMALLEST_SCALE,
    ScaleRule,
    UnquantizableWeightError,
    quantize,
)

RULES = pytest.mark.parametrize("rule", list(ScaleRule))
WIDTHS = pytest.mark.parametrize("bits", BITS)


def random(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * 0.05).to(dtype)


def errors_in_steps(weight: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """|dequantised − weight| / |scale| in float64, [N, groups, group]."""
    grouped = weight.double().view(packed.n, -1, packed.group)
    scales = packed.scales.double().unsqueeze(2)
    values = packed.signed_codes().double().view_as(grouped) * scales
    return ((values - grouped) / scales).abs()


def clamped(packed: PackedWeight) -> torch.Tensor:
    half = 1 << (packed.bits - 1)
    codes = packed.signed_codes()
    return ((codes == half - 1) | (codes == -half)).view(packed.n, -1, packed.group)


def reference_scale(group: torch.Tensor, bits: int, rule: ScaleRule) -> float:
    """The definition, for one group, in float64 and BF16."""
    half = 1 << (bits - 1)
    extreme = max(group.double().tolist(), key=lambda v: (abs(v), v < 0))
    start = abs(extreme) / (half - 1) if rule in (ScaleRule.ABSMAX, ScaleRule.ABSMAX_MSE) else extreme / -half

    def rounded(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float64).to(torch.bfloat16))

    if rule not in SEARCH_POWERS:
        return rounded(start)

    def error(scale: float) -> float:
        codes = (group.double() / scale).round().clamp(-half, half - 1)
        return float((codes * scale - group.double()).pow(SEARCH_POWERS[rule]).sum())

    return min((rounded(start * factor) for factor in SHRINK), key=error)


@RULES
@WIDTHS
@pytest.mark.parametrize(("n", "k", "group"), [(7, 576, 64), (3, 96, 32), (1, 256, 256), (5, 193, None)])
def test_scales_and_codes_are_those_of_the_definition(
    bits: int, rule: ScaleRule, n: int, k: int, group: int | None
) -> None:
    weight = random(n, k)
    packed = quantize(weight, bits, group, rule)
    grouped = weight.view(n, -1, group or k)
    expected = [[reference_scale(cells, bits, rule) for cells in row] for row in grouped]
    torch.testing.assert_close(packed.scales.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0)
    half = 1 << (bits - 1)
    codes = (grouped.double() / packed.scales.double().unsqueeze(2)).round().clamp(-half, half - 1)
    assert torch.equal(packed.signed_codes().double().view_as(codes), codes)


@RULES
@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_element_is_off_by_more_than_half_a_step_unless_clamped(
    bits: int, rule: ScaleRule, dtype: torch.dtype
) -> None:
    weight = random(64, 512, dtype)
    packed = quantize(weight, bits, 128, rule)
    error, at_the_end = errors_in_steps(weight, packed), clamped(packed)
    half_a_step = 0.5 + 1e-5  # float32's division
    assert error[~at_the_end].max() <= half_a_step
    if rule is ScaleRule.ABSMAX:
        assert error.max() <= half_a_step
    if rule is ScaleRule.SIGNED:
        assert error.max() <= 1 + 2.0**-8 * (1 << (bits - 1))  # a step, and the scale's own rounding


@WIDTHS
def test_signed_gives_the_element_of_largest_magnitude_the_lowest_code(bits: int) -> None:
    weight = torch.tensor([[0.5, -1.0, 0.25, 0.0], [0.5, 1.0, 0.25, 0.0], [1.0, -1.0, 0.0, 0.0]])
    packed = quantize(weight, bits, 4, ScaleRule.SIGNED)
    half = 1 << (bits - 1)
    assert packed.scales.flatten().tolist() == [1 / half, -1 / half, 1 / half]
    codes = packed.signed_codes()
    assert codes[0, 1] == codes[1, 1] == codes[2, 1] == -half
    assert codes[2, 0] == half - 1  # the equal of other sign is off by a whole step


@RULES
@WIDTHS
def test_blocks_of_rows_give_what_the_whole_gives(bits: int, rule: ScaleRule) -> None:
    weight = random(11, 192)
    whole = quantize(weight, bits, 64, rule)
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        block, expected = quantize(weight[start:stop], bits, 64, rule), whole.rows(start, stop)
        assert torch.equal(block.words, expected.words)
        assert torch.equal(block.scales, expected.scales)


def test_the_given_weight_is_left_as_it_is() -> None:
    weight = random(4, 64, torch.float32)
    before = weight.clone()
    for rule in ScaleRule:
        quantize(weight, 4, 32, rule)
    assert torch.equal(weight, before)


@WIDTHS
@pytest.mark.parametrize("search", list(SEARCH_POWERS))
def test_the_search_never_has_a_larger_error_than_where_it_starts(bits: int, search: ScaleRule) -> None:
    weight = random(64, 512)

    def errors(rule: ScaleRule) -> torch.Tensor:
        packed = quantize(weight, bits, 64, rule)
        difference = packed.dequantize(torch.float64) - weight.double()
        return difference.view(64, -1, 64).pow(SEARCH_POWERS[search]).sum(2)

    found, start = errors(search), errors(ScaleRule(search.value.split("-")[0]))
    assert (found <= start * (1 + 1e-6)).all()
    assert bits == 8 or found.sum() < 0.95 * start.sum()


def test_every_width_has_a_default_rule() -> None:
    weight = random(4, 64)
    assert set(DEFAULT_RULES) == set(BITS)
    for bits, rule in DEFAULT_RULES.items():
        default, named = quantize(weight, bits, 32), quantize(weight, bits, 32, rule)
        assert torch.equal(default.words, named.words)
        assert torch.equal(default.scales, named.scales)


GROUPS_OF_NOTE = {
    "zero": [0.0] * 32,
    "negative zero": [-0.0] * 32,
    "constant": [0.37] * 32,
    "constant, negative": [-0.37] * 32,
    "all positive": [i / 31 + 1 for i in range(32)],
    "all negative": [-i / 31 - 1 for i in range(32)],
    "one element": [0.0] * 31 + [1.0],
    "scale beyond float16": [5e5 * (-1) ** i for i in range(32)],
    "scale below float16": [1e-7 * (-1) ** i for i in range(32)],
    "scale below 1e-5": [2e-6 * math.sin(i) for i in range(32)],
    "smallest normal": [SMALLEST_SCALE * (-1) ** i for i in range(32)],
    "subnormal": [1e-40 * i for i in range(32)],
    "smallest subnormal": [1e-45] + [0.0] * 31,
    "largest": [LARGEST_WEIGHT, -LARGEST_WEIGHT] + [LARGEST_WEIGHT / 3] * 30,
}


@RULES
@WIDTHS
@pytest.mark.parametrize("values", GROUPS_OF_NOTE.values(), ids=GROUPS_OF_NOTE.keys())
def test_groups_of_note(bits: int, rule: ScaleRule, values: list[float]) -> None:
    check_guarantees(torch.tensor([values], dtype=torch.float64).to(torch.bfloat16), bits, rule)
    check_guarantees(torch.tensor([values], dtype=torch.float32), bits, rule)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.floats(min_value=-LARGEST_WEIGHT, max_value=LARGEST_WEIGHT, width=32, allow_subnormal=True),
        min_size=1,
        max_size=40,
    ),
    bits=st.sampled_from(BITS),
    rule=st.sampled_from(list(ScaleRule)),
)
def test_any_finite_group(values: list[float], bits: int, rule: ScaleRule) -> None:
    check_guarantees(torch.tensor([values], dtype=torch.float32), bits, rule)


def check_guarantees(weight: torch.Tensor, bits: int, rule: ScaleRule) -> None:
    packed = quantize(weight, bits, None, rule)
    values = packed.dequantize()
    assert packed.scales.isfinite().all()
    assert (packed.scales.abs() >= SMALLEST_SCALE).all()
    assert values.isfinite().all()
    assert (values[weight == 0] == 0).all()
    error = errors_in_steps(weight, packed)
    assert (error[~clamped(packed)] <= 0.5 + 1e-5).all()
    if rule is ScaleRule.ABSMAX:
        assert (error <= 0.5 + 1e-5).all()


@RULES
@WIDTHS
def test_a_constant_group_keeps_its_value(bits: int, rule: ScaleRule) -> None:
    for value in (0.37, -0.37, 1e-7, -5e5):
        weight = torch.full((1, 32), value).to(torch.bfloat16)
        values = quantize(weight, bits, 32, rule).dequantize()
        assert torch.allclose(values, weight.float(), rtol=2.0**-8, atol=0)
        if rule is ScaleRule.SIGNED:
            assert torch.equal(values, weight.float())  # a power of two below a BF16 value is a BF16 value


@RULES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_element_that_is_not_finite_is_named(rule: ScaleRule, value: float, dtype: torch.dtype) -> None:
    weight = random(5, 128, dtype)
    weight[3, 70] = value
    weight[4, 0] = math.nan
    with pytest.raises(UnquantizableWeightError, match=f"element {3 * 128 + 70} is {value}") as caught:
        quantize(weight, 4, 64, rule)
    assert isinstance(caught.value, DataError)
    assert caught.value.index == 3 * 128 + 70


def test_an_element_that_bf16_cannot_hold_is_named() -> None:
    weight = torch.zeros(2, 32)
    weight[1, 1] = torch.finfo(torch.float32).max
    with pytest.raises(UnquantizableWeightError, match=r"element 33 is 3\.4"):
        quantize(weight, 8)


@pytest.mark.gpu
@RULES
@WIDTHS
def test_cuda_gives_the_same_codes(bits: int, rule: ScaleRule) -> None:
    weight = random(256, 1536)
    here, there = quantize(weight, bits, 64, rule), quantize(weight.cuda(), bits, 64, rule)
    assert there.words.is_cuda
    if rule in SEARCH_POWERS:  # the sums are added in another order, so that a near tie may fall the other way
        assert (here.scales == there.scales.cpu()).double().mean() > 0.99
    else:
        assert torch.equal(here.scales, there.scales.cpu())
        assert torch.equal(here.words, there.words.cpu())
