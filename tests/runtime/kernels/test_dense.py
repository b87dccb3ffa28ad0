"""BF16 weights against float64; see test_gemv.py for where this runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lbq.runtime.kernels import dense
from lbq.runtime.kernels.gemv.triton import INTERPRETED

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DEVICE = "cpu" if INTERPRETED else "cuda"
Error = Callable[[torch.Tensor, torch.Tensor], float]


def _operands(n: int, k: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    operands = (
        torch.randn(m, k, generator=generator),
        torch.randn(n, k, generator=generator).mul(0.02).bfloat16(),
        torch.randn(n, generator=generator),
    )
    return operands[0].to(DEVICE), operands[1].to(DEVICE), operands[2].to(DEVICE)


@pytest.mark.parametrize(("n", "k"), [(7, 192), (5, 1009), (6, 4304)] + ([] if INTERPRETED else [(1021, 14336)]))
@pytest.mark.parametrize("m", [1, 3])
def test_vectors(n: int, k: int, m: int, relative_error: Error) -> None:
    x, weight, bias = _operands(n, k, m)
    y64 = x.double() @ weight.double().t() + bias.double()
    assert relative_error(dense.gemv(x, weight, bias), y64) <= 2e-6
    half = torch.full((m, n), float("nan"), dtype=torch.float16, device=DEVICE)
    assert relative_error(dense.gemv(x, weight, bias, out=half), y64) <= 5e-4


@pytest.mark.parametrize(("n", "k"), [(7, 192), (64, 1009)] + ([] if INTERPRETED else [(1021, 14336)]))
def test_prompts(n: int, k: int, relative_error: Error) -> None:
    x, weight, bias = _operands(n, k, 33)
    y64 = x.double() @ weight.double().t() + bias.double()
    assert relative_error(dense.matmul(x, weight, bias), y64) <= 2e-5
    assert relative_error(dense.exact_matmul(x, weight, bias), y64) <= 1e-6


@pytest.mark.parametrize("chosen", ["ieee", "tf32"])
def test_full_float32_puts_the_switch_back(chosen: str) -> None:
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, chosen
    try:
        with dense.full_float32():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == chosen
    finally:
        switch.fp32_precision = before
