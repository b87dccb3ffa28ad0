"""A few tokens' product on tensor cores, against float64: see test_gemv.py for where this runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.formats.packing import PackedWeight
from lbq.runtime.kernels import gemv
from lbq.runtime.kernels.batch import batch, planes, warps_for, why_not
from lbq.runtime.kernels.gemv import reference
from lbq.runtime.kernels.gemv.triton import INTERPRETED

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if INTERPRETED else "cuda"
BOUND = 2e-4
Weights = Callable[..., PackedWeight]
Error = Callable[[torch.Tensor, torch.Tensor], float]
CASES = [(4, 256, 128, 3), (4, 419, 419, 2), (8, 128, 64, 16), (8, 200, 200, 5), (4, 272, 272, 1)]
if not INTERPRETED:
    CASES += [(bits, k, k, m) for bits in (4, 8) for k in (1536, 4304, 14336) for m in (1, 2, 4, 7, 8, 16)]
    CASES += [(4, 4096, 256, m) for m in (1, 2, 4, 7, 8, 16)]


@pytest.mark.parametrize(("bits", "k", "group", "m"), CASES)
def test_against_float64(bits, k: int, group: int, m: int, random_weight: Weights, relative_error: Error) -> None:
    for n in (21,) if INTERPRETED else (21, 1024):
        weight = random_weight(n, k, bits, group, DEVICE)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for warps in (1, 2) if INTERPRETED else (1, 2, 4, 8):
            y = batch(planes(x, bits), gemv.arrange(weight), bias, warps=warps)
            assert y.shape == (m, n)
            assert relative_error(y, reference.gemv(x, weight, bias)) <= BOUND


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_do_not_see_each_other(bits: int, random_weight: Weights) -> None:
    weight = gemv.arrange(random_weight(16, 256, bits, 128, DEVICE))
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x[1] *= 1e6
    together = batch(planes(x, bits), weight)
    alone = torch.cat([batch(planes(x[i : i + 1], bits), weight) for i in range(6)])
    assert torch.equal(together, alone)


def test_what_is_broken_stays_with_its_token(random_weight: Weights) -> None:
    weight = gemv.arrange(random_weight(16, 256, 4, 128, DEVICE))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x[1, 200] = float("nan")
    y = batch(planes(x, 4), weight)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]
    assert bool(y[1].isnan().all())


def test_rule_and_refusals(random_weight: Weights) -> None:
    assert [warps_for(n, 4096, 4, 132) for n in (128256, 28672, 4096, 1024)] == [1, 2, 8, 8]
    assert warps_for(1024, 192, 4, 132) == 2
    assert why_not(gemv.arrange(random_weight(4, 192, 3, 64, DEVICE))) == "3-bit codes"
    assert "groups of 64" in str(why_not(gemv.arrange(random_weight(4, 192, 4, 64, DEVICE))))
    assert why_not(gemv.arrange(random_weight(4, 192, 8, 64, DEVICE))) is None


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no races")
def test_repeats_are_bit_identical(random_weight: Weights) -> None:
    weight = gemv.arrange(random_weight(1003, 4096, 4, 256, DEVICE))
    x = planes(torch.randn(16, 4096, device=DEVICE), 4)
    first = batch(x, weight)
    for _ in range(50):
        assert torch.equal(batch(x, weight), first)
